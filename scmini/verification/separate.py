"""The slow twin of everything that is trained here: one plain forward pass for each sequence.

Nothing of the fast way takes part: transformers' own attention and mask, PEFT's own LoRA layers,
whole logits, autograd.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from scmini.models.attention import plain_model
from scmini.training.batches import Group

Gradients = dict[str, Tensor]


class Result(NamedTuple):
    """What a step is made of.

    Attributes:
        logps: (S,) of all sequences of all groups in order, in nats.
        upstream: (S,) the weight of each in the gradient.
        gradients: of sum(upstream * logps), by parameter.
    """

    logps: Tensor
    upstream: Tensor
    gradients: Gradients


def separate(
    model: nn.Module, groups: Sequence[Group], upstream: Callable[[Tensor], Tensor]
) -> Result:
    """Log-probabilities and gradients from separate sequences.

    Args:
        model: a causal LM of transformers, or PEFT around one. Left with plain attention.
        upstream: weights (S,) of the log-probabilities (S,).
    """
    inner = plain_model(model)
    capped = getattr(inner.config, "attn_logit_softcapping", None) is not None
    inner.set_attn_implementation("eager" if capped else "sdpa")  # sdpa knows no softcap
    pairs = [(s[0], s[1]) for group in groups for s in group.sequences]
    with torch.no_grad(), _own_lora(model):
        logps = torch.stack([_logp(inner, *pair) for pair in pairs])
    weights = upstream(logps).to(logps)
    model.zero_grad(set_to_none=True)
    with _own_lora(model):
        for pair, weight in zip(pairs, weights, strict=True):
            (_logp(inner, *pair) * weight).backward()  # type: ignore[no-untyped-call]
    return Result(logps, weights, take_gradients(model))


def _logp(model: Any, prompt: Any, response: Any) -> Tensor:
    """Log-probability of a response in nats: fp32, or fp64 for an fp64 model."""
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    table = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = table.gather(1, ids[0, 1:, None])[:, 0]
    return cast(Tensor, picked[len(prompt) - 1 :].sum())


@contextmanager
def _own_lora(model: nn.Module) -> Iterator[None]:
    """PEFT's forward in layers that were given another one (`scmini.models.qlora.fuse_lora`)."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and "forward" in vars(m)]
    taken = [vars(layer).pop("forward") for layer in layers]
    try:
        yield
    finally:
        for layer, forward in zip(layers, taken, strict=True):
            vars(layer)["forward"] = forward


def take_gradients(model: nn.Module) -> Gradients:
    """The gradients of all trainable parameters, which lose them; zeros where there is none."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            none = parameter.grad is None
            found[name] = torch.zeros_like(parameter.data) if none else cast(Tensor, parameter.grad)
            parameter.grad = None
    return found


def gradient_error(found: Gradients, exact: Gradients) -> float:
    """Largest error of an element, relative to the largest element of its parameter's gradient.

    Infinite or huge where something was found and nothing should be.
    """
    worst = torch.zeros((), dtype=torch.float64)
    for name, grad in exact.items():
        wide = grad.double()
        error = (found[name].double() - wide).abs().max()
        error = error / wide.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        worst = torch.maximum(worst, error.cpu())  # a NaN stays one
    return worst.item()


@contextmanager
def widened(model: nn.Module) -> Iterator[torch.dtype]:
    """Compute with the same weight values in a wider dtype, yielded; exact both ways.

    fp32 for 16 bits, else fp64. NF4 weights are decoded to the values that they always have, in 16
    bits: from inputs in fp32 bitsandbytes itself would decode to others. What transformers itself
    pins to fp32 (normalisation, rotary angles) stays there.
    """
    half = plain_model(model).dtype.itemsize == 2
    wide = torch.float32 if half else torch.float64
    tensors = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
    before = [x.dtype for x in tensors]
    quantised = [m for m in model.modules() if hasattr(m, "compute_dtype")]
    for tensor in tensors:
        tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, wide))
    for module in quantised:
        vars(module)["forward"] = partial(_decoded_linear, module)
    try:
        yield wide
    finally:
        model.zero_grad(set_to_none=True)
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to(dtype)
        for module in quantised:
            del vars(module)["forward"]


def _decoded_linear(layer: Any, x: Tensor) -> Tensor:
    """An NF4 layer's product, in x's dtype."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.detach(), layer.weight.quant_state).to(x.dtype)
    return nn.functional.linear(x, weight, layer.bias)
