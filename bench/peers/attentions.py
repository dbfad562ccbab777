"""Ways to compute attention over a prompt with k+1 responses of ragged lengths.

Each peer takes the layout that it is made for, prepared beforehand, as a model would hold it: the
tree's rows, or whole sequences. What it must do per layer (repeating heads, copying the prompt's
keys) is inside its time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, Shape
from torch import Tensor

from scmini.seeding import rng
from scmini_kernels import PrefixTree, tree_attention

JITTER = 0.4
"""Responses have R tokens, give or take up to this share of them."""


@dataclass(frozen=True)
class Problem:
    """q (1, Hq, T, Dh), k and v (1, Hkv, T, Dh) of one tree, and the result's gradient.

    `pairs` counts the (query, key) pairs that a head needs; `prompt` and `responses` are lengths.
    """

    tree: PrefixTree
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    prompt: int
    responses: list[int]

    @property
    def pairs(self) -> int:
        return int((self.tree.position_ids + 1).sum())


def problem(shape: Shape, case: Case, device: str, dtype: torch.dtype) -> Problem:
    draw = rng(0, "attention", str(case))
    lengths = [
        max(1, round(case.response * (1 + JITTER * draw.uniform(-1, 1)))) for _ in range(case.k + 1)
    ]
    prompt = list(range(case.prompt))
    responses = [[number] * length for number, length in enumerate(lengths)]
    tree = PrefixTree.pack([[(prompt, response) for response in responses]]).to(device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (1, heads, tree.num_tokens, shape.head_dim)
        return torch.randn(size, device=device, generator=generator).to(dtype)

    q, upstream = (normal(shape.heads) for _ in range(2))
    k, v = (normal(shape.kv_heads) for _ in range(2))
    return Problem(tree, q, k, v, upstream, case.prompt, lengths)


@dataclass(frozen=True)
class Peer:
    """A way to attend: `inputs` for `attend`, and where in its result the tree's rows are.

    Attributes:
        inputs: q, k, v in the peer's own layout.
        attend: of them.
        upstream: gradient of the result, in the peer's layout; 0 on what is computed twice.
        gather: result in the peer's layout -> (1, Hq, T, Dh).
        scatter: gradient of an input in the peer's layout -> summed over copies, tree layout.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    upstream: Tensor
    gather: Callable[[Tensor], Tensor]
    scatter: Callable[[Tensor], Tensor]


def peers(inputs: Problem, device: str) -> tuple[dict[str, Peer], dict[str, str]]:
    """The implementations that can be measured here, and why the others cannot."""
    tree = inputs.tree
    found = {
        "scmini, PyTorch": _on_tree(inputs, partial(tree_attention, tree=tree, impl="torch")),
        "SDPA, dense mask": _on_tree(inputs, partial(_masked, mask=tree.reference_mask())),
        "SDPA, k+1 sequences": _on_sequences(inputs),
    }
    absent = {}
    if device != "cuda":
        for name in ("scmini, Triton", "FlexAttention", "varlen_attn, copied prompts"):
            absent[name] = "needs CUDA"
        return found, absent
    if find_spec("triton"):
        found["scmini, Triton"] = _on_tree(
            inputs, partial(tree_attention, tree=tree, impl="triton")
        )
    else:
        absent["scmini, Triton"] = "triton is not installed"
    found["FlexAttention"] = _on_tree(inputs, _flex(tree))
    if find_spec("torch.nn.attention.varlen"):
        found["varlen_attn, copied prompts"] = _on_tree(inputs, _varlen(inputs))
    else:
        absent["varlen_attn, copied prompts"] = "torch has no varlen attention"
    return found, absent


def _on_tree(inputs: Problem, attend: Any) -> Peer:
    return Peer((inputs.q, inputs.k, inputs.v), attend, inputs.upstream, _same, _same)


def _same(x: Tensor) -> Tensor:
    return x


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # Repeated keys, not enable_gqa: no fused CUDA kernel takes both a mask and grouped heads.
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _on_sequences(inputs: Problem) -> Peer:
    """Padded on the right, where padding is behind every token and so needs no mask."""
    prompt, longest = inputs.prompt, max(inputs.responses)
    device = inputs.q.device
    # rows[s, t]: the tree's row of token t of sequence s; padding repeats the last one
    rows = torch.empty(len(inputs.responses), prompt + longest, dtype=torch.int64, device=device)
    rows[:, :prompt] = torch.arange(prompt, device=device)
    first = torch.full((inputs.tree.num_tokens,), -1, device=device)
    start = prompt
    for sequence, length in enumerate(inputs.responses):
        steps = torch.arange(longest, device=device).clamp(max=length - 1)
        rows[sequence, prompt:] = start + steps
        start += length
    flat = rows.flatten()
    # where each row stands first in the flattened sequences
    places = torch.arange(len(flat), device=device)
    first = first.scatter_reduce(0, flat, places, "amin", include_self=False)

    def spread(x: Tensor) -> Tensor:
        return x[0][:, rows].transpose(0, 1).contiguous()

    def gather(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1, 2)[None, :, first]

    def scatter(x: Tensor) -> Tensor:
        by_head = x.transpose(0, 1).flatten(1, 2)
        total = by_head.new_zeros(len(by_head), inputs.tree.num_tokens, x.shape[-1]).double()
        return total.index_add_(1, flat, by_head.double())[None]

    upstream = spread(inputs.upstream).transpose(0, 1).flatten(1, 2)
    kept = torch.zeros(len(flat), dtype=torch.bool, device=device)
    kept[first] = True
    upstream = (upstream * kept[:, None]).unflatten(1, rows.shape).transpose(0, 1).contiguous()
    attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    q, k, v = (spread(x) for x in (inputs.q, inputs.k, inputs.v))
    return Peer((q, k, v), attend, upstream, gather, scatter)


def _flex(tree: PrefixTree) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    end, size = tree.subtree_end, tree.num_tokens

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    mask = create_block_mask(visible, None, None, size, size, device=str(tree.device))
    # Each length is compiled anew, and after some of them dynamo would fall back to no compilation.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, block_mask=mask, enable_gqa=True)


def _varlen(inputs: Problem) -> Any:
    """Queries of each run of the tree by itself; a response's keys are the prompt and its own."""
    from torch.nn.attention.varlen import varlen_attn

    device, prompt = inputs.q.device, inputs.prompt
    starts = torch.tensor([prompt, *inputs.responses]).cumsum(0).tolist()[:-1]
    parts = [torch.arange(prompt)]
    for start, length in zip(starts, inputs.responses, strict=True):
        parts += [torch.arange(prompt), torch.arange(start, start + length)]
    keys = torch.cat(parts).to(device)
    queries = [prompt, *inputs.responses]
    seen = [prompt, *(prompt + length for length in inputs.responses)]
    offsets = [
        torch.tensor([0, *lengths], device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for lengths in (queries, seen)
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        repeats = q.shape[1] // k.shape[1]
        # Not every version that has this function groups heads by itself.
        k, v = (x[keys].repeat_interleave(repeats, dim=1) for x in (k, v))
        sizes = (*offsets, max(queries), max(seen))
        out = varlen_attn(q.contiguous(), k, v, *sizes, **_causal(varlen_attn))
        return out.transpose(0, 1)[None]

    return attend


def _causal(function: Any) -> dict[str, Any]:
    """Causality is an argument of its own in torch up to 2.11, a window since."""
    import inspect

    names = inspect.signature(function).parameters
    return {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}


def errors(inputs: Problem, peer: Peer, mode: str) -> dict[str, float]:
    """Against fp64 on the same (rounded) inputs, over the heads of the first group.

    `value`: the largest absolute error. `gradient`: the largest relative error (Frobenius norm) of
    the gradients of q, k and v; not in mode "forward".
    """
    group = inputs.q.shape[1] // inputs.k.shape[1]
    leaves = [x.detach().requires_grad_(mode == "train") for x in peer.inputs]
    out = peer.attend(*leaves)
    if mode == "train":
        out.backward(peer.upstream)
    q = inputs.q[0, :group].double()
    k, v = inputs.k[0, 0].double(), inputs.v[0, 0].double()
    mask = inputs.tree.reference_mask()
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    worst = 0.0
    for head in range(group):
        exact = [x.detach().requires_grad_() for x in (q[head], k, v)]
        scores = exact[0] @ exact[1].T * q.shape[-1] ** -0.5
        truth = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ exact[2]
        got = peer.gather(out.detach())[0, head].double()
        worst = max(worst, (got - truth).abs().max().item())
        if mode == "train":
            one = torch.autograd.grad(truth, exact, inputs.upstream[0, head].double())
            dq[head] = one[0]
            dk += one[1]
            dv += one[2]
    if mode == "forward":
        return {"value": worst}
    mine = [peer.scatter(leaf.grad)[0].double() for leaf in leaves if leaf.grad is not None]
    mine = [mine[0][:group], mine[1][0], mine[2][0]]
    relative = [((a - b).norm() / b.norm()).item() for a, b in zip(mine, (dq, dk, dv), strict=True)]
    return {"value": worst, "gradient": max(relative)}
