"""Unpatched transformers classes: packed rows against separate sequences, and clear refusals.

The twin is the whole model (head included, so logit scales and softcaps too) under transformers'
own attention, one sequence at a time. Sequences have 8 to 17 tokens, windows 5.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from training_helpers import SHAPE, gradients, response_groups, with_lora

from scmini.errors import ConfigError
from scmini.models import attention
from scmini.models.attention import plain_model, sequence_logps
from scmini.models.loading import enable_checkpointing
from scmini.models.qlora import fuse_lora
from scmini_kernels import PrefixTree

GROUPS = response_groups([2, 1, 3])
WINDOW = 5
GEMMA = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 20,
    "hidden_size": 48,  # head_dim 8 is not hidden_size / 4 heads
    "layer_types": ["sliding_attention", "full_attention"],
}
# (transformers' name, settings, windows that layers 0 and 1 must pass on)
CLASSES: dict[str, tuple[str, dict[str, Any], list[int | None]]] = {
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}, [None, None]),
    "mistral": ("Mistral", {"sliding_window": None}, [None, None]),
    "mistral-window": ("Mistral", {"sliding_window": WINDOW}, [WINDOW, WINDOW]),
    "mistral-wide": ("Mistral", {"sliding_window": 200}, [200, 200]),
    "qwen2": ("Qwen2", {}, [None, None]),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        [None, WINDOW],
    ),
    "qwen3": ("Qwen3", {}, [None, None]),
    "gemma2": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        [WINDOW, None],
    ),
    "gemma3": ("Gemma3", GEMMA, [WINDOW, None]),
    "phi3": ("Phi3", {"sliding_window": None}, [None, None]),
    "phi3-window": ("Phi3", {"sliding_window": WINDOW}, [WINDOW, WINDOW]),
    "cohere": ("Cohere", {"logit_scale": 0.3}, [None, None]),
    "cohere2": (
        "Cohere2",
        {
            "logit_scale": 0.3,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        [WINDOW, None],
    ),
    "granite": (
        "Granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
        },
        [None, None],
    ),
    "olmo2": ("Olmo2", {}, [None, None]),
}
EAGER = ("gemma2",)
"""Only transformers' eager attention caps the scores."""


def _tiny(name: str, settings: dict[str, Any], suffix: str = "ForCausalLM") -> Any:
    prefix = f"{name}Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **settings})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}{suffix}")(config).eval()


def _model(case: str) -> PeftModel:
    name, settings, _ = CLASSES[case]
    # transformers normalises in float32 whatever the dtype.
    return with_lora(_tiny(name, settings)).double()


def _separate_logps(model: PeftModel, implementation: str) -> Tensor:
    plain_model(model).set_attn_implementation(implementation)
    found = []
    for group in GROUPS:
        for prompt, response in group.sequences:
            ids = torch.tensor([[*prompt, *response]])
            logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            targets = logps[:-1].gather(-1, ids[0, 1:, None])[:, 0]
            found.append(targets[len(prompt) - 1 :].sum())
    return torch.stack(found)


def _tree() -> PrefixTree:
    tree = PrefixTree.pack([group.sequences for group in GROUPS])
    assert tree.num_tokens < tree.num_flat_tokens
    return tree


def _windows(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Windows that reach tree attention, layer after layer."""
    seen: list[int | None] = []
    attend = attention.tree_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["window"])
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention, "tree_attention", spy)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CLASSES)
def test_packed_equals_separate(
    case: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities and every LoRA gradient; in training the layers are fused as in a run."""
    model = _model(case)
    expected = _separate_logps(model, "eager" if case in EAGER else "sdpa")
    torch.manual_seed(3)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    grads = gradients(model)
    model.zero_grad()

    assert fuse_lora(model) > 0
    windows = _windows(monkeypatch)
    if checkpointing:
        enable_checkpointing(model.train())
    logps = sequence_logps(model, _tree())
    assert windows == CLASSES[case][2]
    logps.backward(upstream)
    assert len(windows) == (4 if checkpointing else 2)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    found = gradients(model)
    assert set(found) == set(grads)
    assert len(found) >= 16
    for key, grad in grads.items():
        assert grad.abs().max() > 0, key
        bound = 1e-5 * max(1.0, grad.abs().max().item())
        torch.testing.assert_close(found[key], grad, rtol=0, atol=bound, msg=key)


@pytest.mark.parametrize("case", [c for c, (_, _, windows) in CLASSES.items() if WINDOW in windows])
def test_window_is_neither_wider_nor_narrower(case: str) -> None:
    """The comparison above can tell a window that is off by one."""
    expected = sequence_logps(_model(case), _tree())
    name, settings, _ = CLASSES[case]
    for off in (-1, 1):
        other = with_lora(_tiny(name, {**settings, "sliding_window": WINDOW + off})).double()
        assert (sequence_logps(other, _tree()) - expected).abs().max() > 1e-3


def _chunked() -> Any:
    model = _tiny("Llama", {})
    model.config.layer_types = ["chunked_attention", "full_attention"]
    return model


def _masked_window() -> Any:
    """A class that asks for a sliding window, but leaves it to the mask."""
    model = _tiny("Llama", {})
    for layer in model.model.layers:
        layer.self_attn.config = model.config
    model.config.layer_types = ["sliding_attention", "full_attention"]
    return model


def _gpt_oss() -> Any:
    return _tiny("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1})


def _deepseek() -> Any:
    mla = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    moe = {"first_k_dense_replace": 2, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}
    settings = {**mla, **moe, "v_head_dim": 8, "num_experts_per_tok": 1, "head_dim": 4}
    return _tiny("DeepseekV3", {**settings, "num_key_value_heads": 4})


def _bidirectional() -> Any:
    return _tiny("Gemma3", {**GEMMA, "use_bidirectional_attention": True})


def _falcon_h1() -> Any:
    """Attention and a state-space model side by side in each layer."""
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    return _tiny("FalconH1", {**mamba, "mamba_n_groups": 1})


def _stateful() -> Any:
    """As older transformers describe hybrids: no layer types, only this mark."""
    model = _tiny("Llama", {})
    model._is_stateful = True
    return model


RECURRENT = "(linear_attention|hybrid|recurrent state)"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (lambda: _tiny("Mamba", {"state_size": 4}), RECURRENT),
    "falcon-h1": (_falcon_h1, RECURRENT),
    "stateful": (_stateful, "recurrent state"),
    "bloom": (lambda: _tiny("Bloom", {"n_head": 4, "n_layer": 2}), "AttentionInterface"),
    "chunked": (_chunked, "chunked_attention"),
    "masked-window": (_masked_window, "in the mask alone"),
    "gpt-oss": (_gpt_oss, "s_aux"),
    "deepseek": (_deepseek, "another size than keys"),
    "bidirectional": (_bidirectional, "bidirectional"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_says_so(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(ConfigError, match=rf"{message}.*choose another model.model_name_or_path"):
        sequence_logps(build(), _tree())
