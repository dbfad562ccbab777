"""Forward passes over a packed forest of prefix trees, through transformers' own model classes.

The attention function is registered under a name with transformers' `AttentionInterface`; no mask
function goes with it, so transformers builds no mask. The tree travels as a forward keyword through
model, decoder layer and attention module to the function.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from scmini.errors import ConfigError, ScminiError
from scmini_kernels import PrefixTree, linear_logprob, tree_attention

NAME = "scmini_tree"
UNSUPPORTED = ("s_aux", "sinks", "head_mask")
"""Keywords that change what attention computes and that `tree_attention` does not know."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: PrefixTree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """q [1, Hq, T, Dh], k and v [1, Hkv, T, Dh] -> [1, T, Hq, Dh], as transformers calls it."""
    if tree is None:
        raise ScminiError(
            f"attention {NAME!r} was called without a tree: score with "
            "scmini.models.attention.hidden_states, generate with set_attn_implementation('sdpa')"
        )
    if attention_mask is not None:
        raise ScminiError(f"attention {NAME!r} takes no attention_mask: the tree is all it needs")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"{type(module).__name__} needs {name!r} in attention, which prefix trees do not "
                "support; choose another model.model_name_or_path (Llama, Mistral, Qwen, Gemma-2)"
            )
    if dropout:
        raise ConfigError(
            f"the model's attention_dropout is {dropout}: sequences with a common prefix "
            "would share "
            "its dropout; set attention_dropout to 0 in the model's config.json"
        )
    out = tree_attention(
        query, key, value, tree, scale=scaling, window=sliding_window, softcap=softcap
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model (adapter layers in place); others as they are."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = cast(Any, model).get_base_model()
    assert isinstance(inner, PreTrainedModel), type(inner)
    return inner


def hidden_states(model: nn.Module, tree: PrefixTree) -> Tensor:
    """Last hidden states of every row of a forest, by the backbone alone: no logits are made.

    Switches the model to tree attention, where it stays; generation needs
    `set_attn_implementation("sdpa")` again.

    Args:
        model: a transformers model with a head (causal LM, sequence classification), or a PEFT
            model around one. Adapters that are active take part.
        tree: the forest, on the model's device.

    Returns:
        [T, D] in the model's dtype. Row t depends on its own prefix in the tree and nothing else.

    Raises:
        ConfigError: the model's class cannot take another attention, or needs a kind of attention
            that trees do not have.
    """
    inner = plain_model(model)
    if inner.config._attn_implementation != NAME:
        _switch_attention(inner)
    output = inner.base_model(
        input_ids=tree.input_ids[None],
        position_ids=tree.position_ids[None],
        use_cache=False,
        tree=tree,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def sequence_logps(model: nn.Module, tree: PrefixTree) -> Tensor:
    """Log-probability of each sequence of the forest: the sum over its scored tokens.

    Returns:
        [S] fp32 (fp64 for an fp64 model), in nats. Gradients reach every trainable parameter.

    Raises:
        ConfigError: as `hidden_states`; also where the output embedding is adapted or quantised.
    """
    inner = plain_model(model)
    head = output_head(inner)
    hidden = hidden_states(model, tree)
    config = inner.config.get_text_config()
    token_logps = linear_logprob(
        hidden.to(head.weight.dtype),
        head.weight,
        tree.edge_rows,
        tree.edge_targets,
        bias=head.bias,
        logit_scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    return tree.sequence_logps(token_logps)


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The output embedding; `ConfigError` if it is not a plain floating-point Linear."""
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and head.weight.is_floating_point()
    if not plain:
        raise ConfigError(
            f"the output embedding (lm_head) is a {type(head).__name__}: an adapted or quantised "
            "lm_head is not supported; leave lm_head out of sft.lora_target_modules"
        )
    return head


def _switch_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ConfigError(
            f"{type(model).__name__} does not take its attention from transformers' "
            "AttentionInterface; choose another model.model_name_or_path (Llama, Mistral, Qwen)"
        )


def _logit_scale(config: Any) -> float:
    """Factor on the logits: Cohere's `logit_scale`, or 1 over Granite's `logits_scaling`."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return float(scale or 1.0) / float(divisor or 1.0)


def is_half(model: nn.Module) -> bool:
    """Whether the model computes in 16 bits (its head's dtype tells, adapters being fp32)."""
    return plain_model(model).dtype in (torch.bfloat16, torch.float16)
