"""The benchmark's model: a Llama of a given shape with random weights and a LoRA adapter.

Every process builds the same weights from the same seed. The adapter's A and B are both non-zero:
with B = 0 the loss would be log 2 and half of the gradients zero, and equality would prove nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from cases import Shape
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from peers.implementations import Setup

STD = 0.02
"""Of the base weights, as Llama initialises them; so has what the adapter adds."""
SCALING = 2
"""lora_alpha / r."""


def base_model(setup: Setup) -> PreTrainedModel:
    """The frozen base on its device, built layer by layer: never more than one in 16 bits."""
    shape = setup.shape
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.manual_seed(setup.seed)
    torch.set_default_dtype(setup.dtype)
    try:
        with torch.device(setup.device):
            model = LlamaForCausalLM(config)
            layers = model.model.layers
            kind: Any = type(layers[0])
            _fill(model.model.embed_tokens, model.lm_head)
            for number in range(shape.layers):
                layer = kind(config, number)
                _fill(*(module for module in layer.modules() if isinstance(module, nn.Linear)))
                if setup.quantised:
                    _quantise(layer, setup)
                if number == 0:
                    layers[0] = layer
                else:
                    layers.append(layer)
    finally:
        torch.set_default_dtype(before)
    config.num_hidden_layers = shape.layers
    if setup.quantised:
        model.is_loaded_in_4bit = True  # by this PEFT and TRL know a quantised base
    return model.requires_grad_(False).eval()


def lora_config(shape: Shape) -> LoraConfig:
    return LoraConfig(
        r=shape.rank,
        lora_alpha=SCALING * shape.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def fill_adapter(model: PeftModel, seed: int) -> None:
    """Random A and B, by (seed, name) alone, so that every implementation has the same.

    Rounded to bfloat16, in which TRL keeps the adapters of a quantised model.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        values = torch.randn(parameter.shape, generator=generator)
        rank = min(parameter.shape)
        scale = (STD / (SCALING * rank**0.5)) ** 0.5
        with torch.no_grad():
            parameter.copy_((values * scale).to(torch.bfloat16))


def tokenizer() -> PreTrainedTokenizerFast:
    """Two special tokens and no words: TRL wants one, and the benchmark's data are ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    empty = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>", eos_token="</s>")


def _fill(*modules: nn.Module) -> None:
    for module in modules:
        nn.init.normal_(module.weight, std=STD)  # type: ignore[arg-type]


def _quantise(layer: nn.Module, setup: Setup) -> None:
    """Replace the linears of a layer by NF4 ones of the same (rounded) weights."""
    import bitsandbytes as bnb

    found = [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in found:
        nf4 = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=setup.dtype,
            quant_type="nf4",
            device="meta",
        )
        nf4.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            module=nf4,
        ).to(setup.device)
        # On CPUs with AVX512-BF16 bitsandbytes repacks weights in place, which breaks backward.
        nf4.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        setattr(layer.get_submodule(parent), child, nf4)
