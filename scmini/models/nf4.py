"""NF4 layers of bitsandbytes on the CPU: kept as they are for training, decoded for generation."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel


def keep_linear4bit_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking NF4 weights at the first forward without gradients.

    On CPUs with AVX512-BF16 it does so in place, and backward then reads the packed bytes as if
    they were not: wrong gradients, silently.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def decode_once(model: PreTrainedModel) -> None:
    """Replace every NF4 layer by a Linear of the same values."""
    import bitsandbytes as bnb

    kind: Any = bnb.nn.modules.Linear4bit
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    for name, module in found:
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        plain = nn.Linear(1, 1, bias=False, device="meta")
        plain.in_features, plain.out_features = module.in_features, module.out_features
        plain.weight = nn.Parameter(weight.to(model.dtype), requires_grad=False)
        plain.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    # PEFT and transformers must no longer take it for a quantised model.
    inner: Any = model
    inner.is_loaded_in_4bit = inner.is_quantized = False
    del model.config.quantization_config


def has_other_shapes(model: PreTrainedModel) -> bool:
    """Whether a weight was read whose shape is not that of the model's configuration.

    transformers compares the two, but not where it quantises while it reads.
    """
    with torch.device("meta"):
        planned = dict(cast(Any, type(model))(model.config).named_parameters())
    for name, found in model.named_parameters():
        state = getattr(found, "quant_state", None)
        shape = found.shape if state is None else state.shape
        if name in planned and tuple(shape) != tuple(planned[name].shape):
            return True
    return False
