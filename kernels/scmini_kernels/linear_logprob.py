"""Token log-probabilities straight from hidden states: public function, checks, autograd.

With a frozen head, the unit gradient d logp / d hidden (M, D) is made in forward, in the dtype of
hidden_states, so that backward is a row scale and the head is multiplied twice, not three times.
With a trainable head or bias, backward computes the logits again. The bounded workspace is that of
chunked fused linear cross-entropies (Hsu et al., "Liger Kernel", arXiv 2410.10989); they fold the
loss in, here the gradient is kept per token.

The matrix products are the library's in every implementation. What lies between them, and the sum
over repeated rows, is an `_Implementation`: plain PyTorch here, kernels in triton/linear_logprob.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scmini_kernels.reference import at_least_fp32, linear_logprob_reference

LogprobImpl: TypeAlias = Literal["auto", "triton", "torch", "reference"]
_IMPLS = ("auto", "triton", "torch", "reference")
_MIB = 2**20

# Without the knob: on the CPU this much, on a GPU a quarter of what is free within these bounds,
# in whole steps, so that a few MiB more or less in use do not change the chunks.
WORKSPACE_BYTES = 32 * _MIB
_GPU_WORKSPACE_BYTES = (64 * _MIB, 384 * _MIB)
_GPU_WORKSPACE_STEP = 64 * _MIB
# And never fewer rows than this: with fewer, a GEMM takes longer to read the head than to multiply
# by it (cards do 76, an RTX 3090, to 184, an H200, floating-point operations per byte read).
_LEAST_ROWS = 192
# A GEMM is slow when the leading dimension of an operand is no multiple of its vectors, and so is a
# row kernel: rows of the workspace are padded to a multiple of this, and chunks to as many rows.
_ALIGNMENT = 64
# Bound on each smaller temporary tensor: a block of the head that is widened, say.
_SCRATCH_BYTES = 64 * _MIB


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
    workspace_bytes: int | None = None,
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
        impl: "triton" (CUDA, or the CPU under TRITON_INTERPRET=1; not fp64) and "torch" work in
            chunks; "reference" holds the (M, V) logits; "auto" takes "triton" on CUDA where it is
            installed, except for fp64, and "torch" elsewhere. A named choice never falls back.
        workspace_bytes: bound on the logits held at a time, with the buffers of their size; at
            least one row is. Default: 32 MiB on the CPU; on CUDA a quarter of the free memory,
            from 64 to 384 MiB in steps of 64; on both at least 192 rows, since small chunks are
            slow.

    Returns:
        (M,) fp32 (fp64 for fp64 inputs), in nats; at most zero, up to rounding.

    Gradients: to hidden_states (repeated rows are summed in fp32, in a fixed order), lm_head and
    bias, each only if it requires one: a frozen lm_head never gets a (V, D) buffer. The incoming
    gradient may differ per token. Differentiable once (RuntimeError after that). Deterministic, but
    for one thing: the GEMM library may round differently for another number of rows, and by default
    that number depends on the memory that is free. With `workspace_bytes`, equal calls give equal
    bits.

    Memory: the workspace, and some 64 MiB in smaller pieces; for backward, (M, D), and (V, D) in
    fp32 at least while a trainable head's gradient is summed.

    Raises:
        ValueError: wrong shape, dtype, device or option; the message gives expected and received.
            The ranges of rows and targets are checked on the CPU, and on a GPU only under
            CUDA_LAUNCH_BLOCKING=1, as it would make the host wait. Without, no memory outside the
            tensors is read either: with "triton" a target out of range gives NaN, in the result and
            in its gradient; with "torch", and for rows, a device-side assertion of PyTorch fails.
    """
    head = _Head(lm_head, bias, logit_scale, softcap)
    _check(hidden_states, head, rows, targets, impl, workspace_bytes)
    if impl == "reference":
        return linear_logprob_reference(
            hidden_states, lm_head, rows, targets, bias, logit_scale, softcap
        )
    way = _implementation(impl, hidden_states, workspace_bytes)
    inputs = (hidden_states, lm_head, bias)
    # Asked here: inside a Function grad mode is off, and needs_input_grad knows nothing of it.
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        logps: Tensor = _LinearLogprob.apply(*inputs, rows, targets, logit_scale, softcap, way)
        return logps
    return _forward(hidden_states, head, rows, targets, way, keep_unit=False)[0]


class _Head(NamedTuple):
    """Everything between a hidden state and its logits."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class _Implementation(NamedTuple):
    """What differs from one implementation to another.

    score(product, targets, bias, logit_scale, softcap, logps, gradients): from product (C, V), the
        hidden states times the head, to logps (C,) and, unless None, to gradients (C, V), those of
        logps at product. May overwrite product; gradients may be product.
    sum_rows(unit, grad, offsets): (T, D), the sum of grad[m] * unit[m] over offsets[t] <= m <
        offsets[t + 1], in fp32 at least and in this order.
    half_gradients: whether gradients of half-precision models are in half precision, or in fp32 and
        in place of the logits.
    cap_buffers: buffers of the size of the logits that score makes for a softcap.
    """

    score: Callable[..., None]
    sum_rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    half_gradients: bool
    cap_buffers: int
    workspace_bytes: int | None


def _implementation(
    impl: str, hidden_states: Tensor, workspace_bytes: int | None
) -> _Implementation:
    on_cuda, exact = hidden_states.is_cuda, hidden_states.dtype == torch.float64
    if impl == "auto":
        impl = "triton" if on_cuda and not exact and find_spec("triton") else "torch"
    if impl == "torch":
        # The CPU has no half-precision GEMM with fp32 sums, so nothing is gained by rounding.
        return _Implementation(_score, _sum_rows, on_cuda, 1, workspace_bytes)
    if exact:
        raise ValueError("impl='triton': expected bf16, fp16 or fp32 hidden_states, got fp64")
    # Imported where it is used: importing it takes a second, and not every system has it.
    from scmini_kernels.triton import linear_logprob as kernels

    if not on_cuda and not (kernels.INTERPRETED and hidden_states.device.type == "cpu"):
        raise ValueError(
            f"impl='triton': expected CUDA tensors, got {hidden_states.device} (Triton's "
            "interpreter takes those of the CPU, if TRITON_INTERPRET=1 is set before the start)"
        )
    return _Implementation(kernels.score, kernels.sum_rows, True, 0, workspace_bytes)


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
        way: _Implementation,
    ) -> Tensor:
        head = _Head(lm_head, bias, logit_scale, softcap)
        ctx.options = (logit_scale, softcap)
        ctx.way = way
        ctx.num_rows = hidden_states.shape[0]
        ctx.frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        # In row order, so that backward's sum over repeated rows is over neighbours.
        rows, order = rows.sort(stable=True)
        targets = targets[order]
        sorted_logps, unit = _forward(hidden_states, head, rows, targets, way, keep_unit=ctx.frozen)
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
        grad_head = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.frozen:
                unit = saved[0]
            else:
                hidden_states, lm_head, bias, targets = saved
                unit, grad_head, grad_bias = _recompute(
                    hidden_states,
                    _Head(lm_head, bias, *ctx.options),
                    rows,
                    targets,
                    grad,
                    ctx.way,
                    ctx.needs_input_grad[:3],
                )
            grad_hidden = None
            if unit is not None:
                offsets = torch.searchsorted(
                    rows, torch.arange(ctx.num_rows + 1, device=rows.device)
                )
                grad_hidden = ctx.way.sum_rows(unit, grad, offsets)
        return grad_hidden, grad_head, grad_bias, *[None] * 5


def _forward(
    hidden_states: Tensor,
    head: _Head,
    rows: Tensor,
    targets: Tensor,
    way: _Implementation,
    *,
    keep_unit: bool,
) -> tuple[Tensor, Tensor | None]:
    """logp (M,) and, if asked, the unit gradient d logp / d hidden (M, D)."""
    logps = hidden_states.new_empty(len(rows), dtype=at_least_fp32(hidden_states.dtype))
    unit = hidden_states.new_empty(len(rows), hidden_states.shape[1]) if keep_unit else None
    # Autocast would send the fp32 products back to half precision.
    with torch.no_grad(), torch.autocast(logps.device.type, enabled=False):
        for part, product, gradients in _chunks(len(rows), head, way, with_gradients=keep_unit):
            # Not hidden_states[rows[part]], which would count a negative row from the end.
            hidden = hidden_states.index_select(0, rows[part])
            _project(hidden, head.weight, out=product)
            way.score(product, targets[part], *head[1:], logps[part], gradients)
            if unit is not None and gradients is not None:
                _times_head(gradients, head.weight, out=unit[part])
    return logps, unit


def _recompute(
    hidden_states: Tensor,
    head: _Head,
    rows: Tensor,
    targets: Tensor,
    grad: Tensor,
    way: _Implementation,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Unit gradient (M, D), gradient of the head (V, D) and of the bias (V,), where needed."""
    wide = at_least_fp32(hidden_states.dtype)
    unit = hidden_states.new_empty(len(rows), hidden_states.shape[1]) if needs[0] else None
    grad_head = torch.zeros_like(head.weight, dtype=wide) if needs[1] else None
    grad_bias = torch.zeros_like(head.weight[:, 0], dtype=wide) if needs[2] else None
    logps = hidden_states.new_empty(len(rows), dtype=wide)
    for part, product, gradients in _chunks(len(rows), head, way, with_gradients=True):
        hidden = hidden_states.index_select(0, rows[part])
        _project(hidden, head.weight, out=product)
        way.score(product, targets[part], *head[1:], logps[part], gradients)
        if unit is not None:
            _times_head(gradients, head.weight, out=unit[part])
        if grad_head is not None:
            _add_outer(grad_head, gradients, hidden.to(wide) * grad[part, None], hidden.dtype)
        if grad_bias is not None:
            # The logits are done with: their memory takes the widened gradients.
            grad_bias += grad[part] @ product.copy_(gradients)
    if grad_head is not None:
        grad_head = grad_head.to(head.weight.dtype)
    if grad_bias is not None:
        grad_bias = grad_bias.to(head.weight.dtype)
    return unit, grad_head, grad_bias


def _chunks(
    count: int, head: _Head, way: _Implementation, *, with_gradients: bool
) -> Iterator[tuple[slice, Tensor, Any]]:
    """Slices of the M rows, each with room for its logits (C, V) and for their gradients, or None.

    The room is the same memory every time. The chunks are of equal size, but for the last.
    """
    vocabulary, dtype = head.weight.shape[0], head.weight.dtype
    wide = at_least_fp32(dtype)
    narrow = way.half_gradients and dtype != wide
    padded = -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
    buffers = 1 + (way.cap_buffers if head.softcap is not None else 0)
    # The gradients count even where none are made: so the logits have the same bits there.
    row_bytes = padded * (buffers * wide.itemsize + narrow * dtype.itemsize)
    step = _rows_per_chunk(count, row_bytes, head.weight.device, way.workspace_bytes)
    room = head.weight.new_empty(min(step, count), padded, dtype=wide)
    second = room
    if narrow and with_gradients:
        second = torch.empty_like(room, dtype=dtype)
    for start in range(0, count, step):
        size = min(step, count - start)
        product = room[:size, :vocabulary]
        gradients = product if second is room else second[:size, :vocabulary]
        yield slice(start, start + size), product, gradients if with_gradients else None


def _rows_per_chunk(
    count: int, row_bytes: int, device: torch.device, workspace_bytes: int | None
) -> int:
    if workspace_bytes is not None:
        limit = max(1, workspace_bytes // row_bytes)
    else:
        limit = max(_LEAST_ROWS, _free_workspace(device) // row_bytes)
    unit = _ALIGNMENT if limit >= _ALIGNMENT else 1
    limit -= limit % unit
    # As few chunks as the limit allows, and those equal: a short last one would be slow.
    even = -(-count // max(1, -(-count // limit)))
    return max(1, -(-even // unit)) * unit


def _free_workspace(device: torch.device) -> int:
    """Bytes for the workspace when the caller leaves the choice."""
    if device.type != "cuda":
        return WORKSPACE_BYTES
    free = torch.cuda.mem_get_info(device)[0]
    # Freed by PyTorch's allocator, but kept by it.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    least, most = _GPU_WORKSPACE_BYTES
    return min(most, max(least, free // 4 // _GPU_WORKSPACE_STEP * _GPU_WORKSPACE_STEP))


def _score(
    product: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    logps: Tensor,
    gradients: Tensor | None,
) -> None:
    """See `_Implementation`; in plain PyTorch, in place of product."""
    logits = product
    if bias is not None:
        logits += bias
    if logit_scale != 1.0:
        logits *= logit_scale
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = logits.square().neg_().add_(1) if gradients is not None else None
        logits.mul_(softcap)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    picked = logits.gather(1, targets[:, None])
    totals = logits.exp_().sum(dim=1, keepdim=True)
    logps.copy_((picked - totals.log())[:, 0])
    if gradients is None:
        return
    # onehot - softmax; the target's 1 - p comes from logp, so that one write does it.
    logits.mul_(totals.reciprocal_().neg_()).scatter_(
        1, targets[:, None], -torch.expm1(logps)[:, None]
    )
    if slope is not None:
        logits *= slope
    if logit_scale != 1.0:
        logits *= logit_scale
    if gradients is not logits:
        gradients.copy_(logits)


def _sum_rows(unit: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """See `_Implementation`; in plain PyTorch."""
    out = unit.new_empty(len(offsets) - 1, unit.shape[1])
    width = max(1, _SCRATCH_BYTES // (max(1, len(unit)) * grad.itemsize))
    for start in range(0, unit.shape[1], width):
        part = slice(start, start + width)
        scaled = unit[:, part] * grad[:, None]  # in grad's dtype, which is the wider
        out[:, part] = torch.segment_reduce(scaled, "sum", offsets=offsets, axis=0, unsafe=True)
    return out


# The three matrix products. Half-precision operands are multiplied as they are and summed in fp32:
# on CUDA by the GEMM itself; on the CPU, which has no such GEMM, by widening the head in blocks.


def _project(hidden: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """hidden (C, D) @ weight.T (D, V) -> out (C, V) in fp32 at least."""
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif weight.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for part in _head_blocks(weight):
            torch.mm(hidden, weight[part].to(out.dtype).T, out=out[:, part])


def _times_head(gradients: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """gradients (C, V) @ weight (V, D) -> out (C, D) in weight's dtype."""
    if gradients.dtype == weight.dtype and (weight.is_cuda or weight.itemsize > 2):
        # The GEMM reads gradients in vectors of 16 bytes if their number is whole. The few terms
        # left come first, so that the sum of the many is rounded once.
        whole = weight.shape[0] // 8 * 8
        if 0 < whole < weight.shape[0]:
            torch.mm(gradients[:, whole:], weight[whole:], out=out)
            out.addmm_(gradients[:, :whole], weight[:whole])
        else:
            torch.mm(gradients, weight, out=out)
        return
    total = gradients.new_zeros(out.shape, dtype=at_least_fp32(weight.dtype))
    for part in _head_blocks(weight):
        total.addmm_(gradients[:, part].to(total.dtype), weight[part].to(total.dtype))
    out.copy_(total)


def _add_outer(out: Tensor, gradients: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    """out (V, D) += gradients.T (V, C) @ hidden (C, D); out is fp32 at least, dtype the model's."""
    if not out.is_cuda or dtype == out.dtype:
        out.addmm_(gradients.T.to(out.dtype), hidden)
        return
    hidden = hidden.to(dtype)
    for part in _head_blocks(out):
        out[part] += torch.mm(gradients[:, part].T, hidden, out_dtype=out.dtype)


def _head_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of the vocabulary of which one, in fp32, takes at most _SCRATCH_BYTES."""
    step = max(1, _SCRATCH_BYTES // (4 * max(1, weight.shape[1])))
    step = max(step // _ALIGNMENT * _ALIGNMENT, min(step, _ALIGNMENT))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _check(
    hidden_states: Tensor,
    head: _Head,
    rows: Tensor,
    targets: Tensor,
    impl: str,
    workspace_bytes: int | None,
) -> None:
    if impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(_IMPLS)}, got {impl!r}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {head.softcap}")
    if workspace_bytes is not None and not (
        isinstance(workspace_bytes, int) and workspace_bytes > 0
    ):
        raise ValueError(f"workspace_bytes: expected a positive int, got {workspace_bytes!r}")
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
        if _may_wait(x.device) and len(x) and (x.min() < 0 or x.max() >= size):
            raise ValueError(
                f"{name}: expected values in [0, {size}), got {int(x.min())} to {int(x.max())}"
            )


def _may_wait(device: torch.device) -> bool:
    """Whether the host may look at values on the device: it waits for every kernel as it is."""
    return device.type == "cpu" or (
        device.type == "cuda" and os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
    )
