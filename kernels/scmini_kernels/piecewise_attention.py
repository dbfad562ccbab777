"""tree_attention in plain PyTorch: fused attention on rectangles, joined by their log-sum-exp.

For keys in several pieces, with outputs o_p and log-sum-exps l_p over the keys of piece p,

    l = log sum_p exp(l_p),    o = sum_p exp(l_p - l) o_p

is attention over all of them. Backward gives every piece the joined o and l: the weights are then
exp(score - l), so gradients of the queries add up and nothing has to be kept per piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scmini_kernels._attention_plan import Piece, plan
from scmini_kernels.reference import at_least_fp32
from scmini_kernels.tree import PrefixTree


class _Scores(NamedTuple):
    """How scores are made, and by which of the two ways."""

    scale: float
    softcap: float | None
    fused: bool


def piecewise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Arguments and result: see `tree_attention`. Memory: masks of the small pieces only."""
    # PyTorch's fused CPU attention is called by its own name: the public function hides the
    # log-sum-exp. It knows no softcap, and it serves no other device.
    scores = _Scores(scale, softcap, q.device.type == "cpu" and softcap is None)
    # Asked here: inside a Function grad mode is off.
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _PiecewiseAttention.apply(q, k, v, tree, window, scores)
        return out
    return _forward(q, k, v, tree, window, scores)[0]


class _PiecewiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tree: PrefixTree,
        window: int | None,
        scores: _Scores,
    ) -> Tensor:
        out, lse = _forward(q, k, v, tree, window, scores)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = (tree, window, scores)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        made = _backward(grads[0], inputs, out, lse, *ctx.options)
        needed = (x if need else None for x, need in zip(made, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree, window: int | None, scores: _Scores
) -> tuple[Tensor, Tensor]:
    """out (1, Hq, T, Dh) in q's dtype and log-sum-exp (1, Hq, T) in fp32 at least."""
    wide = at_least_fp32(q.dtype)
    out = _empty_rows(q, wide)
    lse = out.new_empty(q.shape[:3])
    for piece, mask in _pieces(tree, window, q):
        rows = slice(piece.q_start, piece.q_stop)
        part, part_lse = _attend(_Operands.of(piece, q, k, v), piece, mask, scores)
        part, part_lse = _unbatch(part, piece), _unbatch(part_lse, piece)
        if piece.kind != "full":
            out[:, :, rows], lse[:, :, rows] = part, part_lse
            continue
        joined = torch.logaddexp(lse[:, :, rows], part_lse)
        old, new = (lse[:, :, rows] - joined).exp_(), (part_lse - joined).exp_()
        out[:, :, rows].mul_(old[..., None]).addcmul_(part.to(wide), new[..., None])
        lse[:, :, rows] = joined
    return out.to(q.dtype), lse


def _backward(
    grad: Tensor,
    inputs: list[Tensor],
    out: Tensor,
    lse: Tensor,
    tree: PrefixTree,
    window: int | None,
    scores: _Scores,
) -> list[Tensor]:
    """Gradients of q, k and v."""
    wide = at_least_fp32(out.dtype)
    sums = [_empty_rows(x, wide) for x in inputs]
    for piece, mask in _pieces(tree, window, out):
        operands = _Operands.of(piece, *inputs)
        rows = slice(piece.q_start, piece.q_stop)
        firsts = (piece.q_start, piece.k_start, piece.k_start)
        saved = [_batch(x[:, :, rows], piece) for x in (grad, out, lse)]
        parts = _attend_backward(saved, operands, piece, mask, scores)
        for total, part, first in zip(sums, parts, firsts, strict=True):
            _add_rows(total, _unbatch(part, piece), first, piece)
    return [total.to(out.dtype) for total in sums]


def _add_rows(total: Tensor, part: Tensor, first: int, piece: Piece) -> None:
    """total[first:] += part, where rows that no piece has written yet count as zero.

    Own pieces come first and in row order, so each is the first to write its own rows.
    """
    if piece.kind == "full":
        total[:, :, first : first + part.shape[2]] += part
        return
    before = piece.q_start - first  # keys left of the queries, in a window's band
    if before:
        total[:, :, first : piece.q_start] += part[:, :, :before]
    total[:, :, piece.q_start : piece.q_stop] = part[:, :, before:]


def _empty_rows(like: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, H, T, Dh), laid out token by token as the layers before and after want it."""
    _, heads, rows, size = like.shape
    return like.new_empty((1, rows, heads, size), dtype=dtype).transpose(1, 2)


def _pieces(tree: PrefixTree, window: int | None, q: Tensor) -> list[tuple[Piece, Tensor | None]]:
    """The plan with its masks, made once per forest for all layers of a model."""
    flop_per_score = 14 * q.shape[1] * q.shape[3]  # 2 products forward, 5 backward
    key = ("pieces", window, flop_per_score, q.dtype)
    if key not in tree.cache:
        pieces = plan(tree, window, flop_per_score)
        tree.cache[key] = [(piece, _mask(piece, tree, window, q.dtype)) for piece in pieces]
    made: list[tuple[Piece, Tensor | None]] = tree.cache[key]
    return made


def _mask(piece: Piece, tree: PrefixTree, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of a tree piece: 0 where the query sees the key, else -inf."""
    if piece.kind != "tree":
        return None
    queries = torch.arange(piece.q_start, piece.q_stop, device=tree.device)[:, None]
    keys = torch.arange(piece.k_start, piece.k_stop, device=tree.device)
    seen = (keys <= queries) & (queries < tree.subtree_end[keys])
    if window is not None:
        seen &= tree.position_ids[queries] - tree.position_ids[keys] < window
    return torch.zeros(seen.shape, dtype=dtype, device=tree.device).masked_fill_(~seen, -torch.inf)


class _Operands(NamedTuple):
    """q (B, Hq, n, Dh), k and v (B, Hkv, m, Dh) of one piece, as views."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> _Operands:
        keys = slice(piece.k_start, piece.k_stop)
        parts = (q[:, :, piece.q_start : piece.q_stop], k[:, :, keys], v[:, :, keys])
        return cls(*(_batch(x, piece) for x in parts))


def _batch(x: Tensor, piece: Piece) -> Tensor:
    """(1, H, count * n, ...) -> (count, H, n, ...)."""
    if piece.repeats == 1:
        return x
    return x[0].unflatten(1, (piece.repeats, -1)).transpose(0, 1)


def _unbatch(x: Tensor, piece: Piece) -> Tensor:
    """(count, H, n, ...) -> (1, H, count * n, ...)."""
    if piece.repeats == 1:
        return x
    return x.transpose(0, 1).flatten(1, 2)[None]


def _attend(
    operands: _Operands, piece: Piece, mask: Tensor | None, scores: _Scores
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, n, Dh) and log-sum-exp (B, Hq, n) of one piece."""
    causal = piece.kind == "causal"
    if scores.fused:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *operands, 0.0, causal, attn_mask=mask, scale=scores.scale
        )
        return out, lse
    raw, _ = _raw_scores(operands, causal, mask, scores)
    lse = raw.logsumexp(dim=-1)
    weights = (raw - lse[..., None]).exp_()
    return _per_query_head(weights, operands, operands.v), lse


def _attend_backward(
    saved: list[Tensor],
    operands: _Operands,
    piece: Piece,
    mask: Tensor | None,
    scores: _Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the piece's q, k and v; saved: its rows of grad, joined out, joined lse."""
    grad, out, lse = saved
    causal = piece.kind == "causal"
    if scores.fused:
        made: tuple[Tensor, Tensor, Tensor] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, *operands, out, lse, 0.0, causal, attn_mask=mask, scale=scores.scale
            )
        )
        return made
    q, k, v = operands
    raw, slope = _raw_scores(operands, causal, mask, scores)
    weights = raw.sub_(lse[..., None]).exp_()
    grad = grad.to(weights.dtype)
    delta = (grad * out).sum(dim=-1, keepdim=True)
    heads = q.shape[1] // k.shape[1]
    from_v = _grouped(grad, heads) @ v.to(grad.dtype).unsqueeze(2).mT
    grad_scores = weights * (from_v.flatten(1, 2) - delta) * scores.scale
    if slope is not None:
        grad_scores *= slope
    return (
        _per_query_head(grad_scores, operands, k),
        _per_key_head(grad_scores, q, heads),
        _per_key_head(weights, grad, heads),
    )


def _raw_scores(
    operands: _Operands, causal: bool, mask: Tensor | None, scores: _Scores
) -> tuple[Tensor, Tensor | None]:
    """Masked scores (B, Hq, n, m) and, with a cap, its derivative."""
    q, k, _ = operands
    wide = at_least_fp32(q.dtype)
    raw = _grouped(q.to(wide), q.shape[1] // k.shape[1]) @ k.to(wide).unsqueeze(2).mT
    raw = raw.flatten(1, 2).mul_(scores.scale)
    slope = None
    if scores.softcap is not None:
        raw.div_(scores.softcap).tanh_()
        slope = 1 - raw.square()
        raw.mul_(scores.softcap)
    if mask is not None:
        raw += mask
    elif causal:
        hidden = torch.ones(raw.shape[-2:], dtype=torch.bool, device=raw.device).triu_(1)
        raw.masked_fill_(hidden, -torch.inf)
    return raw, slope


def _grouped(x: Tensor, heads: int) -> Tensor:
    """(B, Hq, n, m) -> (B, Hkv, heads, n, m): the query heads of each key head."""
    return x.unflatten(1, (-1, heads))


def _per_query_head(weights: Tensor, operands: _Operands, x: Tensor) -> Tensor:
    """(B, Hq, n, m) @ (B, Hkv, m, Dh) -> (B, Hq, n, Dh)."""
    heads = operands.q.shape[1] // x.shape[1]
    return (_grouped(weights, heads) @ x.to(weights.dtype).unsqueeze(2)).flatten(1, 2)


def _per_key_head(weights: Tensor, x: Tensor, heads: int) -> Tensor:
    """Sum over each key head's queries: (B, Hq, n, m).mT @ (B, Hq, n, Dh) -> (B, Hkv, m, Dh)."""
    return (_grouped(weights, heads).mT @ _grouped(x.to(weights.dtype), heads)).sum(dim=2)
