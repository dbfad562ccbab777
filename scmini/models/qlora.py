"""LoRA layers as one operation: products in the model's dtype, nothing saved that is not needed.

PEFT's forward of a LoRA layer casts its input to the adapter's float32, multiplies in float32,
clones the base layer's result, scales and adds: passes over [tokens, features] that the result does
not need, and float32 copies of the input that are kept for backward. `fuse_lora` gives such layers
a forward that computes

    y = x W^T + bias + (x (s A)^T) B^T

by three matrix products, the last one accumulated into the first one's result, and keeps x and
x (s A)^T, [tokens, rank], for backward. A and B stay float32 (masters), are cast where they are
used, and their gradients come back in float32. NF4 weights are decoded for each product (QLoRA,
arXiv 2305.14314) and never kept.
"""

import contextlib
import functools
import math
from typing import Any, cast

import torch
from peft.tuners.lora import layer as lora_layer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Linear4bit: Any = None
LoraLinear4bit: Any = None
with contextlib.suppress(ImportError):  # bitsandbytes exists for Linux alone
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit  # type: ignore[no-redef]
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

_workspaces: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
"""Decoded weights, by device, dtype and CUDA stream: one buffer of the largest layer's size."""


def fuse_lora(model: nn.Module) -> int:
    """Give PEFT's LoRA layers on Linear and NF4 Linear layers a forward in fewer passes.

    The instances' `forward` is replaced; modules, parameters, state dict, merging and saving are
    PEFT's. Each call looks whether it is the simple case: one active adapter, enabled, not merged,
    without dropout, bias or a variant (DoRA and others), a frozen base layer in x's dtype, no
    autocast, no hook inside. Every other call goes to PEFT's own forward.

    The result is PEFT's up to rounding: in float32 the same to about 1e-6 relative; in 16 bits the
    adapter's products are rounded to the model's dtype, as under autocast. Differentiable once.

    Returns:
        The number of layers that were changed.
    """
    kinds = tuple(kind for kind in (lora_layer.Linear, LoraLinear4bit) if kind is not None)
    layers = [m for m in model.modules() if type(m) in kinds and "forward" not in vars(m)]
    for layer in layers:
        cast(Any, layer).forward = functools.partial(_forward, layer)
    return len(layers)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _is_simple(layer, x):
        return type(layer).forward(layer, x, *args, **kwargs)
    name = layer.active_adapters[0]
    base = layer.base_layer
    out: Tensor = _LoraLinear.apply(
        x,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        base.weight,
        base.bias,
        layer.scaling[name],
    )
    return out


def _is_simple(layer: Any, x: Tensor) -> bool:
    """Whether `_LoraLinear` computes what PEFT's forward would; cheap, as it runs at each call."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged_adapters or len(active) != 1:
        return False
    name = active[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    dropout, base = layer.lora_dropout[name], layer.base_layer
    inner = (base, layer.lora_A[name], layer.lora_B[name])
    return (
        (type(dropout) is nn.Identity or not layer.training)
        and not any(map(_is_intercepted, inner))
        and type(inner[1]) is type(inner[2]) is nn.Linear
        and not torch.is_autocast_enabled(x.device.type)
        and _base_dtype(base) == x.dtype
        and not base.weight.requires_grad
        and (base.bias is None or (base.bias.dtype == x.dtype and not base.bias.requires_grad))
    )


def _is_intercepted(module: nn.Module) -> bool:
    """Whether calling the module runs anything besides its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _base_dtype(base: Any) -> torch.dtype | None:
    """The dtype in which a base layer multiplies; None for a layer that is not fused."""
    if type(base) is nn.Linear:
        return base.weight.dtype
    if Linear4bit is None or type(base) is not Linear4bit:
        return None
    state = base.weight.quant_state
    # bitsandbytes fills these in at the first forward, or packs the weights for its CPU kernel.
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    return cast(torch.dtype, state.dtype) if base.compute_dtype == state.dtype else None


class _LoraLinear(torch.autograd.Function):
    """x [..., K], A [r, K], B [N, r], frozen weight [N, K] (plain or NF4) and bias [N], s."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Any, bias: Tensor | None, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ _cast(a, scaling, x.dtype).t()
        # Not a view of a product: autograd refuses in-place operations on such an output.
        out = x.new_empty(*x.shape[:-1], b.shape[0])
        flat = out.view(-1, b.shape[0])
        if bias is None:
            torch.mm(rows, _decoded(weight).t(), out=flat)
        else:
            torch.addmm(bias, rows, _decoded(weight).t(), out=flat)
        flat.addmm_(low, b.to(x.dtype).t())
        ctx.weight, ctx.scaling = weight, scaling
        _, needs_a, needs_b = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if needs_a else None, low if needs_b else None, a, b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        upstream = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = grad_b = None
        if needs_x or needs_a:
            grad_low = upstream @ b.to(grad.dtype)
        if needs_a:
            rows = x.reshape(-1, x.shape[-1])
            grad_a = _float_product(grad_low.t(), rows, a.dtype).mul_(ctx.scaling)
        if needs_b:
            grad_b = _float_product(upstream.t(), low, b.dtype)
        if needs_x:
            grad_x = upstream @ _decoded(ctx.weight)
            grad_x.addmm_(grad_low, _cast(a, ctx.scaling, grad.dtype))
            grad_x = grad_x.view(*grad.shape[:-1], a.shape[1])
        return grad_x, grad_a, grad_b, None, None, None


def _cast(a: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s A, rounded once."""
    return (a * scaling).to(dtype)


def _float_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, without rounding to the operands' 16 bits where CUDA can."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(dtype)


def _decoded(weight: Any) -> Tensor:
    """[N, K] weight of a layer; NF4 is decoded, on CUDA into a buffer that the next call reuses.

    Nobody may keep the result beyond the product that it is for. Products and decoding follow one
    another on their stream, so the buffer is never overwritten early. Where bitsandbytes cannot
    decode into a given tensor (on the CPU) a new one is made, and freed after the product.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    if not weight.is_cuda:
        return dequantize_4bit(weight.detach(), state)
    out = _workspace(weight.device, state.dtype, math.prod(state.shape)).view(state.shape)
    return dequantize_4bit(weight.detach(), state, out=out)


def _workspace(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """A buffer [size], the same memory at every call on the same stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, dtype, stream)
    if key not in _workspaces or _workspaces[key].numel() < size:
        _workspaces.pop(key, None)  # freed before the larger one is made
        with torch.inference_mode(False):  # else it could not be written outside that mode
            _workspaces[key] = torch.empty(size, dtype=dtype, device=device)
    return _workspaces[key][:size]
