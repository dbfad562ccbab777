"""Checks of `tree_attention` and `linear_logprob` against their plain twins, by themselves."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scmini.seeding import rng
from scmini.verification.checks import Check, Finding, Problem, within_budget
from scmini_kernels import PrefixTree, linear_logprob, tree_attention
from scmini_kernels.tree import SequenceLike

Operation = Callable[..., Tensor]


class Sizes(NamedTuple):
    """How large the problems are; nothing is a multiple of a tile.

    Attributes:
        prompt: tokens of the shared prompt.
        response: tokens of the longest response.
        heads: query heads, key heads.
        head_size: of attention.
        hidden: size of a hidden state.
        vocabulary: rows of the output embedding.
        scored: log-probabilities.
        window: of the sliding-window case.
    """

    prompt: int
    response: int
    heads: tuple[int, int]
    head_size: int
    hidden: int
    vocabulary: int
    scored: int
    window: int


SMALL = Sizes(45, 23, (4, 2), 64, 72, 331, 83, 11)
"""For the CPU and Triton's interpreter: seconds."""
LARGE = Sizes(601, 211, (8, 2), 128, 1000, 32001, 777, 150)
"""For a GPU: some 2 GiB in fp64."""

DRAWS = 8
"""Problems that plain PyTorch's error is taken from."""

ATTENTION: dict[str, dict[str, float]] = {
    "prefix trees": {},
    "sliding window": {"window": 0},
    "softcap": {"softcap": 4.0, "scale": 0.2},
}
"""Options of each case; the window's width depends on the sizes."""
HEAD: dict[str, dict[str, float]] = {
    "frozen head": {},
    "trainable head": {},
    "trainable head, softcap": {"softcap": 3.0, "logit_scale": 0.7},
}


def kernel_checks(
    device: torch.device,
    dtype: torch.dtype,
    impl: str,
    implementation: str,
    *,
    skip: str = "",
    attention: Operation = tree_attention,
    logprob: Operation = linear_logprob,
) -> list[Check]:
    """One check for each case of each operation.

    Args:
        impl: as the operations take it.
        implementation: how the table calls it.
        skip: why this implementation cannot run here, if so.
    """
    sizes = LARGE if device.type == "cuda" else SMALL

    def check(name: str, measure: Callable[[], Iterator[Finding]]) -> Check:
        return Check(name, implementation, str(dtype).removeprefix("torch."), measure, skip)

    def attend(name: str) -> Iterator[Finding]:
        return _attention(attention, impl, sizes, device, dtype, ATTENTION[name])

    def project(name: str) -> Iterator[Finding]:
        frozen = name == "frozen head"
        return _head(logprob, impl, sizes, device, dtype, HEAD[name], frozen=frozen)

    return [
        *(check(f"tree_attention, {name}", partial(attend, name)) for name in ATTENTION),
        *(check(f"linear_logprob, {name}", partial(project, name)) for name in HEAD),
    ]


def _attention(
    attention: Operation,
    impl: str,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> Iterator[Finding]:
    tree = forest(sizes.prompt, sizes.response).to(device)
    if "window" in options:
        options = {**options, "window": sizes.window}
    mask = tree.reference_mask()
    if "window" in options:
        distance = tree.position_ids[:, None] - tree.position_ids[None, :]
        mask = mask & (distance < options["window"])
    scale = options.get("scale", sizes.head_size**-0.5)
    heads = {"q": sizes.heads[0], "k": sizes.heads[1], "v": sizes.heads[1]}
    shapes = {name: (1, count, tree.num_tokens, sizes.head_size) for name, count in heads.items()}

    def problem(seed: int) -> Problem:
        draw = _Draw(seed, device, dtype)
        return Problem({name: draw(*shape) for name, shape in shapes.items()}, draw(*shapes["q"]))

    def plain(late: bool) -> Operation:
        return partial(
            plain_attention, mask=mask, scale=scale, softcap=options.get("softcap"), late=late
        )

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, tree, impl=impl, **options)

    ways = [plain(late=False), plain(late=True)]
    yield from within_budget(fast, ways, [problem(seed) for seed in range(DRAWS)])


def _head(
    logprob: Operation,
    impl: str,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any],
    *,
    frozen: bool,
) -> Iterator[Finding]:
    draw = _Draw(DRAWS, device, dtype)
    # The last rows predict nothing; ten or more others predict several tokens.
    rows = draw.integers(sizes.scored - 20, sizes.scored)
    targets = draw.integers(sizes.vocabulary, sizes.scored)

    def problem(seed: int) -> Problem:
        draw = _Draw(seed, device, dtype)
        inputs = {
            "hidden_states": draw(sizes.scored - 10, sizes.hidden),
            "lm_head": draw(sizes.vocabulary, sizes.hidden) * (2 / math.sqrt(sizes.hidden)),
            "bias": draw(sizes.vocabulary),
        }
        return Problem(inputs, draw(sizes.scored), ("lm_head", "bias") if frozen else ())

    def plain(folded: bool) -> Operation:
        return partial(plain_logprob, rows=rows, targets=targets, folded=folded, **options)

    def fast(hidden_states: Tensor, lm_head: Tensor, bias: Tensor) -> Tensor:
        return logprob(hidden_states, lm_head, rows, targets, bias=bias, impl=impl, **options)

    ways = [plain(folded=False), plain(folded=True)]
    yield from within_budget(fast, ways, [problem(seed) for seed in range(DRAWS)])


def forest(prompt: int, response: int) -> PrefixTree:
    """Two prompts with responses (one empty, some with a common start), a document, and tiny ones.

    Errors are largest where there is one key only; many roots make their maximum a steady number.
    """
    draw = rng(0, "forest of the verification")

    def ids(length: int) -> list[int]:
        return [draw.randrange(1000) for _ in range(length)]

    start = ids(response // 3)
    groups: list[list[SequenceLike]] = []
    for length in (prompt, prompt // 3):
        shared = ids(length)
        tails = [[], ids(1), ids(response), start + ids(response // 2), start + ids(response // 4)]
        groups.append([(shared, tail) for tail in tails])
    documents = [[ids(length)] for length in (response + 1, *[1, 2] * 6)]
    return PrefixTree.pack([*groups, *documents])


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    late: bool = False,
) -> Tensor:
    """Attention as a model in this dtype would compute it: only the softmax is wider than 16 bits.

    q (1, Hq, T, Dh), k and v (1, Hkv, T, Dh), mask (T, T) bool; returns (1, Hq, T, Dh).

    Args:
        late: normalise after the product with v, as every fused attention does, PyTorch's included.
            The gradient of a row's scores is then a difference of two products that are rounded
            differently, where the softmax's own backward has exact zeros in rows of one key.
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scores.to(wide).masked_fill(~mask, float("-inf"))
    if not late:
        return scores.softmax(dim=-1).to(v.dtype) @ v
    weights = (scores - scores.detach().amax(dim=-1, keepdim=True)).exp()
    out = (weights.to(v.dtype) @ v).to(wide) / weights.sum(dim=-1, keepdim=True)
    return out.to(v.dtype)


def plain_logprob(
    hidden_states: Tensor,
    lm_head: Tensor,
    bias: Tensor,
    rows: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    folded: bool = False,
) -> Tensor:
    """Log-probabilities (M,) from whole logits in this dtype; the softmax alone is wider.

    Args:
        folded: the bias is one more column of lm_head, so that its gradient is summed by a matrix
            product, as fused implementations do.
    """
    hidden = hidden_states[rows]
    if folded:
        hidden = torch.cat((hidden, hidden.new_ones(len(rows), 1)), dim=1)
        logits = hidden @ torch.cat((lm_head, bias[:, None]), dim=1).T * logit_scale
    else:
        logits = (hidden @ lm_head.T + bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]


class _Draw:
    """Random tensors, the same on every device."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, bound: int, count: int) -> Tensor:
        """From [0, bound)."""
        return torch.randint(bound, (count,), generator=self.generator).to(self.device)
