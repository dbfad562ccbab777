"""Token log-probabilities straight from hidden states: public function, checks, PyTorch way.

With a frozen head, the unit gradient d logp / d hidden (M, D) is made in forward, in the dtype of
hidden_states, so that backward is a row scale and the head is multiplied twice, not three times.
With a trainable head or bias, backward computes the logits again. The bounded workspace is that of
chunked fused linear cross-entropies (Hsu et al., "Liger Kernel", arXiv 2410.10989); they fold the
loss in, here the gradient is kept per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scmini_kernels.reference import at_least_fp32, linear_logprob_reference

LogprobImpl: TypeAlias = Literal["auto", "torch", "reference"]
_IMPLS = ("auto", "torch", "reference")

# Bound on the logits held at a time, with the buffers of their size; at least one row is.
WORKSPACE_BYTES = 256 * 2**20


def linear_logprob(
    hidden_states: Tensor,
    lm_head: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: LogprobImpl = "auto",
) -> Tensor:
    """Log-probability of each target token, without ever holding the (M, V) logits.

    Equals, up to rounding,

        logits = logit_scale * (hidden_states[rows].float() @ lm_head.float().T + bias)
        logits = softcap * tanh(logits / softcap)                  # with softcap
        logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    M target tokens, T rows of hidden states, D hidden size, V vocabulary size. Logits are fp32
    whatever the inputs: bf16 logits would cost about 0.3 nat on a sequence of 256 tokens.

    Args:
        hidden_states: (T, D) bf16, fp16, fp32 or fp64.
        lm_head: (V, D), same dtype and device.
        rows: (M,) int64 in [0, T): the row that predicts each target. May repeat: the last token of
            a shared prompt predicts the first token of every response.
        targets: (M,) int64 in [0, V).
        bias: (V,), same dtype and device, added to the logits.
        logit_scale: factor on the logits, bias included.
        softcap: bound on the scaled logits, > 0.
        impl: "torch" works in chunks; "reference" holds the (M, V) logits; "auto" takes "torch".
            A named choice never falls back.

    Returns:
        (M,) fp32 (fp64 for fp64 inputs), in nats; at most zero, up to rounding.

    Gradients: to hidden_states (repeated rows are summed in fp32, in a fixed order), lm_head and
    bias, each only if it requires one: a frozen lm_head never gets a (V, D) buffer. The incoming
    gradient may differ per token. Deterministic. Differentiable once (RuntimeError after that).

    Memory: a workspace of `WORKSPACE_BYTES` (or one row of logits); for backward, (M, D), and
    (V, D) in fp32 at least while a trainable head's gradient is summed.

    Raises:
        ValueError: wrong shape, dtype, device or option; the message gives expected and received.
            The ranges of rows and targets are checked on the CPU only: on a GPU it would wait.
    """
    head = _Head(lm_head, bias, logit_scale, softcap)
    _check(hidden_states, head, rows, targets, impl)
    if impl == "reference":
        return linear_logprob_reference(
            hidden_states, lm_head, rows, targets, bias, logit_scale, softcap
        )
    return _torch_linear_logprob(hidden_states, head, rows, targets)


class _Head(NamedTuple):
    """Everything between a hidden state and its logits."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def _torch_linear_logprob(
    hidden_states: Tensor, head: _Head, rows: Tensor, targets: Tensor
) -> Tensor:
    inputs = (hidden_states, head.weight, head.bias)
    # Asked here: inside a Function grad mode is off, and needs_input_grad knows nothing of it.
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        logps: Tensor = _LinearLogprob.apply(*inputs, rows, targets, head.logit_scale, head.softcap)
        return logps
    return _forward(hidden_states, head, rows, targets, keep_unit=False)[0]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        targets: Tensor,
        logit_scale: float,
        softcap: float | None,
    ) -> Tensor:
        head = _Head(lm_head, bias, logit_scale, softcap)
        ctx.options = (logit_scale, softcap)
        ctx.num_rows = hidden_states.shape[0]
        ctx.frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        # In row order, so that backward's sum over repeated rows is over neighbours.
        rows, order = rows.sort(stable=True)
        targets = targets[order]
        sorted_logps, unit = _forward(hidden_states, head, rows, targets, keep_unit=ctx.frozen)
        if ctx.frozen:
            ctx.save_for_backward(rows, order, unit)
        else:
            ctx.save_for_backward(rows, order, hidden_states, lm_head, bias, targets)
        return torch.empty_like(sorted_logps).index_copy_(0, order, sorted_logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, order, *saved = ctx.saved_tensors
        grad = grads[0][order]
        if ctx.frozen:
            return _sum_rows(saved[0], grad, rows, ctx.num_rows), *[None] * 6
        hidden_states, lm_head, bias, targets = saved
        head = _Head(lm_head, bias, *ctx.options)
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(grad.device.type, enabled=False):
            unit, grad_head, grad_bias = _recompute(hidden_states, head, rows, targets, grad, needs)
        grad_hidden = None if unit is None else _sum_rows(unit, grad, rows, ctx.num_rows)
        return grad_hidden, grad_head, grad_bias, *[None] * 4


def _forward(
    hidden_states: Tensor, head: _Head, rows: Tensor, targets: Tensor, *, keep_unit: bool
) -> tuple[Tensor, Tensor | None]:
    """logp (M,) and, if asked, the unit gradient d logp / d hidden (M, D)."""
    logps = hidden_states.new_empty(len(rows), dtype=at_least_fp32(hidden_states.dtype))
    unit = hidden_states.new_empty(len(rows), hidden_states.shape[1]) if keep_unit else None
    # Autocast would send the fp32 products back to half precision.
    with torch.no_grad(), torch.autocast(logps.device.type, enabled=False):
        for part in _chunks(len(rows), head):
            logits = _logits(hidden_states[rows[part]], head)
            logps[part] = _logps_in_place(logits, targets[part], head, to_gradient=keep_unit)
            if unit is not None:
                unit[part] = _times_head(logits, head.weight)
    return logps, unit


def _recompute(
    hidden_states: Tensor,
    head: _Head,
    rows: Tensor,
    targets: Tensor,
    grad: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Unit gradient (M, D), gradient of the head (V, D) and of the bias (V,), where needed."""
    wide = at_least_fp32(hidden_states.dtype)
    unit = hidden_states.new_empty(len(rows), hidden_states.shape[1]) if needs[0] else None
    grad_head = torch.zeros_like(head.weight, dtype=wide) if needs[1] else None
    grad_bias = torch.zeros_like(head.weight[:, 0], dtype=wide) if needs[2] else None
    for part in _chunks(len(rows), head):
        hidden = hidden_states[rows[part]]
        logits = _logits(hidden, head)
        _logps_in_place(logits, targets[part], head, to_gradient=True)
        if grad_bias is not None:
            grad_bias += grad[part] @ logits
        if grad_head is not None:
            _add_outer(grad_head, logits, hidden.to(wide) * grad[part, None], hidden.dtype)
        if unit is not None:
            unit[part] = _times_head(logits, head.weight)
    if grad_head is not None:
        grad_head = grad_head.to(head.weight.dtype)
    if grad_bias is not None:
        grad_bias = grad_bias.to(head.weight.dtype)
    return unit, grad_head, grad_bias


def _chunks(count: int, head: _Head) -> Iterator[slice]:
    """Slices of the M rows whose logits fit the workspace."""
    vocabulary, dtype = head.weight.shape[0], head.weight.dtype
    wide = at_least_fp32(dtype)
    # Logits and their copy in half precision, and the derivative of the cap.
    buffers = 1 + (dtype != wide) + (head.softcap is not None)
    step = max(1, WORKSPACE_BYTES // (vocabulary * wide.itemsize * buffers))
    return (slice(start, start + step) for start in range(0, count, step))


def _logits(hidden: Tensor, head: _Head) -> Tensor:
    """(C, V) in fp32 at least, scaled; the cap is not applied yet."""
    logits = _project(hidden, head.weight)
    if head.bias is not None:
        logits += head.bias
    if head.logit_scale != 1.0:
        logits *= head.logit_scale
    return logits


def _logps_in_place(logits: Tensor, targets: Tensor, head: _Head, *, to_gradient: bool) -> Tensor:
    """logp (C,) of the targets. Overwrites logits, if asked with d logp / d (hidden @ head.T)."""
    slope = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = logits.square().neg_().add_(1) if to_gradient else None
        logits.mul_(head.softcap)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    picked = logits.gather(1, targets[:, None])
    totals = logits.exp_().sum(dim=1, keepdim=True)
    logps = picked - totals.log()
    if to_gradient:
        # onehot - softmax; the target's 1 - p comes from logp, so that one write does it.
        logits.div_(totals).neg_().scatter_(1, targets[:, None], -torch.expm1(logps))
        if slope is not None:
            logits *= slope
        if head.logit_scale != 1.0:
            logits *= head.logit_scale
    return logps[:, 0]


def _sum_rows(unit: Tensor, grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """out[t] = sum of grad[m] * unit[m] over the m with rows[m] == t; rows ascending. (T, D)."""
    offsets = torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device))
    out = unit.new_empty(num_rows, unit.shape[1])
    width = max(1, WORKSPACE_BYTES // (max(1, len(rows)) * grad.itemsize))
    for start in range(0, unit.shape[1], width):
        part = slice(start, start + width)
        scaled = unit[:, part] * grad[:, None]  # in grad's dtype, which is the wider
        out[:, part] = torch.segment_reduce(scaled, "sum", offsets=offsets, axis=0, unsafe=True)
    return out


# The three matrix products. Half-precision operands are multiplied as they are and summed in fp32:
# on CUDA by the GEMM itself; on the CPU, which has no such GEMM, by widening the head in blocks.


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (C, D) @ weight.T (D, V) -> (C, V) in fp32 at least."""
    wide = at_least_fp32(weight.dtype)
    if wide == weight.dtype:
        return torch.mm(hidden, weight.T)
    if weight.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=wide)
    hidden = hidden.to(wide)
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for part in _head_blocks(weight):
        out[:, part] = torch.mm(hidden, weight[part].to(wide).T)
    return out


def _times_head(logit_grads: Tensor, weight: Tensor) -> Tensor:
    """logit_grads (C, V) @ weight (V, D) -> (C, D) in weight's dtype."""
    if logit_grads.dtype == weight.dtype or weight.is_cuda:
        return torch.mm(logit_grads.to(weight.dtype), weight)
    out = logit_grads.new_zeros(logit_grads.shape[0], weight.shape[1])
    for part in _head_blocks(weight):
        out.addmm_(logit_grads[:, part], weight[part].to(out.dtype))
    return out.to(weight.dtype)


def _add_outer(out: Tensor, logit_grads: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    """out (V, D) += logit_grads.T (V, C) @ hidden (C, D), all fp32 at least; dtype the model's."""
    if out.is_cuda and dtype != out.dtype:
        out += torch.mm(logit_grads.to(dtype).T, hidden.to(dtype), out_dtype=out.dtype)
    else:
        out.addmm_(logit_grads.T, hidden)


def _head_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of the vocabulary of which one, in fp32, takes at most a quarter of the workspace."""
    step = max(1, WORKSPACE_BYTES // (16 * weight.shape[1]))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _check(hidden_states: Tensor, head: _Head, rows: Tensor, targets: Tensor, impl: str) -> None:
    if impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(_IMPLS)}, got {impl!r}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {head.softcap}")
    _check_tensors(hidden_states, head.weight, head.bias)
    _check_indices(hidden_states, head.weight, rows, targets)


def _check_tensors(hidden_states: Tensor, lm_head: Tensor, bias: Tensor | None) -> None:
    if hidden_states.dim() != 2 or not hidden_states.is_floating_point():
        raise ValueError(
            "hidden_states: expected floating point of shape (T, D), "
            f"got {hidden_states.dtype} of shape {tuple(hidden_states.shape)}"
        )
    size = hidden_states.shape[1]
    if lm_head.dim() != 2 or lm_head.shape[1] != size or lm_head.shape[0] == 0:
        raise ValueError(f"lm_head: expected shape (V, {size}), got {tuple(lm_head.shape)}")
    if bias is not None and tuple(bias.shape) != (lm_head.shape[0],):
        raise ValueError(f"bias: expected shape ({lm_head.shape[0]},), got {tuple(bias.shape)}")
    for name, x in (("lm_head", lm_head), ("bias", bias)):
        if x is not None and x.dtype != hidden_states.dtype:
            raise ValueError(
                f"{name}: expected hidden_states' dtype {hidden_states.dtype}, got {x.dtype}"
            )
        if x is not None and x.device != hidden_states.device:
            raise ValueError(
                f"{name}: expected hidden_states' device {hidden_states.device}, got {x.device}"
            )


def _check_indices(hidden_states: Tensor, lm_head: Tensor, rows: Tensor, targets: Tensor) -> None:
    if rows.dim() != 1 or targets.shape != rows.shape:
        raise ValueError(
            "rows and targets: expected the same shape (M,), "
            f"got {tuple(rows.shape)} and {tuple(targets.shape)}"
        )
    for name, x, size in (
        ("rows", rows, hidden_states.shape[0]),
        ("targets", targets, lm_head.shape[0]),
    ):
        if x.dtype != torch.int64:
            raise ValueError(f"{name}: expected torch.int64, got {x.dtype}")
        if x.device != hidden_states.device:
            raise ValueError(
                f"{name}: expected hidden_states' device {hidden_states.device}, got {x.device}"
            )
        if x.device.type == "cpu" and len(x) and (x.min() < 0 or x.max() >= size):
            raise ValueError(
                f"{name}: expected values in [0, {size}), got {int(x.min())} to {int(x.max())}"
            )
