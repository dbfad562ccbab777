"""The tree forward of unpatched transformers classes against one plain forward per sequence."""

import pytest
import torch
from training_helpers import (
    MODELS,
    gradients,
    random_ids,
    response_groups,
    separate_logps,
    tiny_model,
    with_lora,
)

from scmini.errors import ConfigError, ScminiError
from scmini.models.attention import NAME, hidden_states, sequence_logps
from scmini.models.loading import enable_checkpointing
from scmini_kernels import PrefixTree

GROUPS = response_groups([2, 1, 3])
# transformers normalises in float32 whatever the dtype, hence not 1e-12.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4}


def _tree() -> PrefixTree:
    tree = PrefixTree.pack([group.sequences for group in GROUPS])
    assert tree.num_tokens < tree.num_flat_tokens
    return tree


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_tree_equals_separate_sequences(name: str, dtype: torch.dtype) -> None:
    """Log-probabilities and LoRA gradients, with a random upstream gradient that changes sign."""
    model = with_lora(tiny_model(name)).to(dtype)
    if name == "gemma2":
        # Only transformers' eager attention caps the scores of Gemma-2.
        model.get_base_model().set_attn_implementation("eager")
    torch.manual_seed(3)
    upstream = torch.randn(sum(len(g.sequences) for g in GROUPS), dtype=dtype)
    expected = _separate(model, name)
    expected.backward(upstream)
    grads = gradients(model)
    model.zero_grad()
    logps = sequence_logps(model, _tree())
    logps.backward(upstream)
    assert logps.dtype == dtype
    torch.testing.assert_close(logps, expected, rtol=0, atol=TOLERANCE[dtype])
    found = gradients(model)
    assert set(found) == set(grads)
    assert all("lora" in key for key in found)
    for key, grad in grads.items():
        bound = TOLERANCE[dtype] * max(1.0, grad.abs().max().item())
        torch.testing.assert_close(found[key], grad, rtol=0, atol=bound, msg=key)
        assert grad.abs().max() > 0, key


def _separate(model: torch.nn.Module, name: str) -> torch.Tensor:
    if name != "gemma2":
        return separate_logps(model, GROUPS)
    inner = model.get_base_model()  # type: ignore[operator]
    switch = type(inner).set_attn_implementation
    inner.set_attn_implementation = lambda _: switch(inner, "eager")
    try:
        return separate_logps(model, GROUPS)
    finally:
        del inner.set_attn_implementation


def test_sliding_window_matters() -> None:
    """The test above would pass with the window ignored if no sequence were longer."""
    model = tiny_model("mistral-window")
    narrow = sequence_logps(model, _tree())
    model.config.sliding_window = 200
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = 200
    assert not torch.allclose(narrow, sequence_logps(model, _tree()), atol=1e-2)


def test_full_training_reaches_every_parameter() -> None:
    """Without an adapter, head and embeddings train too (tied here): gradients of the slow twin."""
    model = tiny_model("llama-tied").double()
    separate_logps(model, GROUPS).sum().backward()
    grads = gradients(model)
    model.zero_grad()
    sequence_logps(model, _tree()).sum().backward()
    found = gradients(model)
    assert set(found) == set(dict(model.named_parameters()))
    for key, grad in grads.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-5, msg=key)


def test_checkpointing_changes_nothing() -> None:
    model = with_lora(tiny_model()).train()
    sequence_logps(model, _tree()).sum().backward()
    grads = gradients(model)
    model.zero_grad()
    enable_checkpointing(model)
    calls = []
    layer = model.get_base_model().model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    sequence_logps(model, _tree()).sum().backward()
    assert len(calls) == 2, "the layer was not computed again in backward"
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, grads[key], rtol=0, atol=0, msg=key)


def test_generation_after_scoring() -> None:
    model = tiny_model()
    ids = torch.tensor([random_ids(0, 6)])
    before = model.generate(ids, max_new_tokens=4, do_sample=False)
    hidden_states(model, _tree())
    with pytest.raises(ScminiError, match="without a tree"):
        model(input_ids=ids)
    model.set_attn_implementation("sdpa")
    assert model.generate(ids, max_new_tokens=4, do_sample=False).tolist() == before.tolist()


def test_no_mask_is_built() -> None:
    model = tiny_model()
    masks = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    hidden_states(model, _tree())
    assert masks == [None]
    assert model.config._attn_implementation == NAME


def test_adapted_head_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ConfigError, match="lm_head"):
        sequence_logps(model, _tree())


def test_attention_dropout_is_refused() -> None:
    model = tiny_model().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="attention_dropout"):
        hidden_states(model, _tree())
