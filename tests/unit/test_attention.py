"""The tree forward of unpatched transformers classes against one plain forward per sequence."""

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import (
    MODELS,
    gradients,
    random_ids,
    response_groups,
    separate_logps,
    text_groups,
    tiny_model,
    with_lora,
)

from scmini.errors import ConfigError, EnvironmentProblem, ScminiError
from scmini.models.attention import (
    NAME,
    VARLEN_NAME,
    choose_attention,
    hidden_states,
    sequence_logps,
)
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


def _varlen_twin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
) -> Tensor:
    """flash-attn's documented function in plain PyTorch, document by document, at any precision."""
    assert causal
    assert deterministic
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    assert int(cu_seqlens_q[-1]) == len(q)
    outs = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        scores = softmax_scale * query @ key.mT
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        left, right = window_size
        hidden = behind < 0 if right < 0 else behind < -right
        if left >= 0:
            hidden |= behind > left
        outs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Puts a stand-in for flash-attn in place; the list collects its windows."""
    calls: list[tuple[int, int]] = []

    def function(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["window_size"])
        return _varlen_twin(*args, **kwargs)

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_flash_attention_where_nothing_is_shared(
    name: str, flash_calls: list[tuple[int, int]]
) -> None:
    tree = PrefixTree.pack([group.sequences for group in text_groups(5)])
    assert all(tree.unbranched)
    assert len(set(torch.tensor(tree.root_starts).diff().tolist())) > 1
    model = with_lora(tiny_model(name)).double()
    upstream = torch.randn(5, dtype=torch.float64)
    expected = sequence_logps(model, tree)
    expected.backward(upstream)
    grads = gradients(model)
    model.zero_grad()
    assert not flash_calls
    choose_attention(model, "flash_attention_2")
    found = sequence_logps(model, tree)
    found.backward(upstream)
    assert model.config._attn_implementation == VARLEN_NAME
    windows = {
        "llama": [(-1, -1)] * 2,
        "mistral-window": [(4, 0)] * 2,
        "gemma2": [(4, 0), (-1, -1)],
    }
    assert flash_calls == windows[name]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for key, grad in gradients(model).items():
        bound = 1e-5 * max(1.0, grads[key].abs().max().item())
        torch.testing.assert_close(grad, grads[key], rtol=0, atol=bound, msg=key)


def test_flash_attention_leaves_branches_to_the_tree(flash_calls: list[tuple[int, int]]) -> None:
    model = tiny_model()
    expected = sequence_logps(model, _tree())
    choose_attention(model, "flash_attention_2")
    torch.testing.assert_close(sequence_logps(model, _tree()), expected, rtol=0, atol=0)
    assert not flash_calls
    model.set_attn_implementation("sdpa")  # to generate; the choice stays
    single = PrefixTree.pack([[random_ids(0, 6)]])
    sequence_logps(model, single)
    assert len(flash_calls) == 2
    choose_attention(model, "tree")
    sequence_logps(model, single)
    assert len(flash_calls) == 2


def test_flash_attention_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EnvironmentProblem, match=r"flash-attn: pip install 'scmini\[flash\]'"):
        choose_attention(model, "flash_attention_2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="CUDA device, and there is none"):
        choose_attention(model, "flash_attention_2")
    choose_attention(model, "tree")
    assert sequence_logps(model, _tree()).isfinite().all()
