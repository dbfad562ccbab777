"""Attention over a packed forest of prefix trees: public function, checks, PyTorch way.

The PyTorch way is scaled_dot_product_attention, once per tree: causal where the tree is one run,
under a bool mask where it branches. Neighbouring runs of equal length make one batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from scmini_kernels.reference import masked_attention, tree_attention_reference
from scmini_kernels.tree import PrefixTree

AttentionImpl: TypeAlias = Literal["auto", "torch", "reference"]
_IMPLS = ("auto", "torch", "reference")


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    impl: AttentionImpl = "auto",
) -> Tensor:
    """Softmax attention in which each token sees exactly its own prefix of a packed forest.

    Equals, up to rounding,

        scores = scale * q @ k.mT                                  # (Hq, T, T)
        scores = softcap * tanh(scores / softcap)                  # with softcap
        scores[~tree.reference_mask()] = -inf
        out = scores.softmax(-1) @ v

    so every sequence of the forest gets the result of causal attention over it alone, and shared
    prefixes are computed once. T rows of the forest, Hq query heads, Hkv key heads, Dh head size.
    Rotary embeddings are the caller's: apply them with `tree.position_ids` beforehand.

    Args:
        q: (1, Hq, T, Dh) bf16, fp16, fp32 or fp64.
        k: (1, Hkv, T, Dh), q's dtype and device; Hkv divides Hq (grouped queries).
        v: like k.
        tree: the packed forest, on the same device.
        scale: factor on the scores; default Dh ** -0.5.
        window: a query sees itself and the window - 1 tokens before it, counted along the sequence
            (`position_ids`).
        softcap: bound on the scores, > 0; applied before the mask.
        impl: "torch" works tree by tree; "reference" holds the (Hq, T, T) scores; "auto" takes
            "torch". A named choice never falls back.

    Returns:
        (1, Hq, T, Dh) in q's dtype.

    Gradients: to q, k and v.

    Memory: for a branching tree of n rows, n^2 bytes for a mask that all layers share (made once
    per forest and window), nothing for other trees. With softcap, (Hq, n, n) scores per tree.

    Raises:
        ValueError: wrong shape, dtype, device or option; the message gives expected and received.
    """
    _check(q, k, v, tree, window, softcap)
    if impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(_IMPLS)}, got {impl!r}")
    if window is not None and window >= tree.depth:
        window = None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attend = tree_attention_reference if impl == "reference" else _torch_attention
    return attend(q, k, v, tree, scale, window, softcap)


class _Block(NamedTuple):
    """Consecutive trees of `length` rows each; unbranched and equally long if more than one.

    mask (length, length) is None where plain causal attention is exact.
    """

    trees: int
    length: int
    mask: Tensor | None


def _torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    key = ("attention blocks", window)
    if key not in tree.cache:
        tree.cache[key] = _blocks(tree, window)
    blocks: list[_Block] = tree.cache[key]
    # split, not slices: its backward is one concatenation, where each slice would add a zero-filled
    # gradient of full size (32 documents of 40 tokens: 3 ms instead of 11 ms on one core).
    sizes = [block.trees * block.length for block in blocks]
    parts = zip(blocks, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    return torch.cat(
        [_attend(block, *qkv, scale=scale, softcap=softcap) for block, *qkv in parts], dim=2
    )


def _blocks(tree: PrefixTree, window: int | None) -> list[_Block]:
    blocks: list[_Block] = []
    bounds = zip(tree.root_starts, tree.root_starts[1:], strict=False)
    mergeable = False  # whether the last block takes another tree of its length
    for (start, end), unbranched in zip(bounds, tree.unbranched, strict=True):
        length = end - start
        if unbranched and mergeable and blocks[-1].length == length:
            blocks[-1] = blocks[-1]._replace(trees=blocks[-1].trees + 1)
            continue
        plain = unbranched and (window is None or window >= length)
        mask = None if plain else _tree_mask(tree, start, end, window)
        blocks.append(_Block(1, length, mask))
        mergeable = unbranched
    return blocks


def _tree_mask(tree: PrefixTree, start: int, end: int, window: int | None) -> Tensor:
    rows = torch.arange(start, end, device=tree.device)
    mask = (rows[None, :] <= rows[:, None]) & (rows[:, None] < tree.subtree_end[None, start:end])
    if window is not None:
        positions = tree.position_ids[start:end]
        mask &= positions[:, None] - positions[None, :] < window
    return mask


def _attend(
    block: _Block, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    if block.trees > 1:
        q, k, v = (_trees_to_batch(x, block) for x in (q, k, v))
    if softcap is not None:
        mask = block.mask
        if mask is None:
            ones = torch.ones(block.length, block.length, dtype=torch.bool, device=q.device)
            mask = ones.tril()
        out = masked_attention(q, k, v, mask, scale, softcap)
    elif block.mask is None:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        # Repeated keys, not enable_gqa: no fused CUDA kernel takes both a mask and grouped heads.
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask, scale=scale)
    if block.trees > 1:
        out = out.transpose(0, 1).flatten(1, 2)[None]
    return out


def _trees_to_batch(x: Tensor, block: _Block) -> Tensor:
    """(1, H, trees * length, Dh) -> (trees, H, length, Dh)."""
    return x[0].unflatten(1, (block.trees, block.length)).transpose(0, 1)


def _check(
    q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, window: int | None, softcap: float | None
) -> None:
    if q.dim() != 4 or q.shape[0] != 1 or q.shape[2] != tree.num_tokens:
        raise ValueError(
            f"q: expected shape (1, Hq, {tree.num_tokens}, Dh), T = {tree.num_tokens} being the "
            f"rows of the tree, got {tuple(q.shape)}"
        )
    if not q.is_floating_point():
        raise ValueError(f"q: expected a floating-point dtype, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        expected = (1, k.shape[1] if k.dim() == 4 else "Hkv", q.shape[2], q.shape[3])
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, expected a multiple of the {k.shape[1]} heads of k and v"
        )
    if tree.device != q.device:
        raise ValueError(f"tree: expected q's device {q.device}, got {tree.device}; use tree.to()")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 (the query itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {softcap}")
