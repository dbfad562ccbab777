"""Liger's kernels: on one instance only, and (with a GPU) equal to transformers' code."""

import importlib.machinery
import sys
import types
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_helpers import gradients, response_groups, tiny_model, with_lora
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from scmini.errors import ConfigError, EnvironmentProblem
from scmini.models.attention import sequence_logps
from scmini.models.elementwise import MODEL_TYPES, apply_liger, check_liger
from scmini_kernels import PrefixTree


def _tree() -> PrefixTree:
    return PrefixTree.pack([group.sequences for group in response_groups([2, 3])])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A liger_kernel that patches as the real one does, names of the module included; counts."""
    calls = {"rope": 0, "norm": 0}
    norm_forward = LlamaRMSNorm.forward

    def rope(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls["rope"] += 1
        return apply_rotary_pos_emb(*args, **kwargs)

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        calls["norm"] += 1
        return norm_forward(self, x)

    def patch(model: Any, *, cross_entropy: bool, fused_linear_cross_entropy: bool) -> None:
        assert not cross_entropy
        assert not fused_linear_cross_entropy
        modeling_llama.apply_rotary_pos_emb = rope
        modeling_llama.LlamaRMSNorm = type("LigerRMSNorm", (nn.Module,), {})
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                vars(module)["forward"] = MethodType(norm, module)

    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module: Any = types.ModuleType("liger_kernel.transformers.monkey_patch")
    module._apply_liger_kernel_to_instance = patch
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_only_this_instance_is_patched(stand_in: dict[str, int]) -> None:
    before = dict(vars(modeling_llama))
    model, other = tiny_model(), tiny_model()
    expected = sequence_logps(other, _tree())
    apply_liger(model)
    changed = [n for n, v in vars(modeling_llama).items() if before.get(n) is not v]
    assert not changed, "transformers' module was left patched"
    adapted = with_lora(model)  # adapters come on top
    with adapted.disable_adapter():
        torch.testing.assert_close(sequence_logps(adapted, _tree()), expected, rtol=0, atol=0)
    assert stand_in == {"rope": 2, "norm": 5}
    sequence_logps(other, _tree())
    assert stand_in == {"rope": 2, "norm": 5}
    assert list(model.state_dict()) != []


def test_nothing_is_left_behind_by_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(*args: Any, **kwargs: Any) -> None:
        modeling_llama.apply_rotary_pos_emb = None
        raise RuntimeError("no such layer")

    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module: Any = types.ModuleType("liger_kernel.transformers.monkey_patch")
    module._apply_liger_kernel_to_instance = patch
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(RuntimeError, match="no such layer"):
        apply_liger(tiny_model())
    assert modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb


def test_other_kinds_of_model_are_refused(stand_in: dict[str, int]) -> None:
    model = tiny_model()
    model.config.model_type = "cohere"
    with pytest.raises(ConfigError, match=r"model.use_liger_kernel: .*'cohere'.*llama"):
        apply_liger(model)


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'scmini\[liger\]'"):
        check_liger()
    spec = importlib.machinery.ModuleSpec("liger_kernel", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="CUDA device, and there is none"):
        check_liger()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_liger()


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3", "gemma2"])
def test_real_liger_patches_one_instance(name: str) -> None:
    """The installed Liger against the installed transformers; nothing is computed."""
    pytest.importorskip("liger_kernel")
    model = tiny_model(name)
    assert model.config.model_type in MODEL_TYPES
    modeling = sys.modules[type(model).__module__]
    before = dict(vars(modeling))
    apply_liger(model)
    assert all(vars(modeling)[key] is value for key, value in before.items())
    layer = model.model.layers[0]
    rope = layer.self_attn.forward.__func__.__globals__["apply_rotary_pos_emb"]
    assert rope.__module__.startswith("liger_kernel")
    for module in (layer.mlp, layer.input_layernorm, model.model.norm):
        assert module.forward.__func__.__module__.startswith("liger_kernel"), module
    assert "forward" not in vars(model), "the head's loss was replaced"


def test_real_rope_takes_positions_that_restart(device: torch.device) -> None:
    """Forward and backward on a packed row, T = 37, heads 4 and 2, size 8."""
    rope = pytest.importorskip("liger_kernel.transformers.rope").liger_rotary_pos_emb
    model = tiny_model().to(device)
    positions = torch.tensor([[*range(11), *range(7, 20), *range(13)]], device=device)
    cos, sin = model.model.rotary_emb(torch.empty(1, device=device), positions)
    torch.manual_seed(0)
    results = []
    q, k = (torch.randn(1, 37, heads, 8, device=device) for heads in (4, 2))
    upstream = [torch.randn(1, heads, 37, 8, device=device) for heads in (4, 2)]
    for function in (apply_rotary_pos_emb, rope):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        # Liger rotates in place, so not the leaves themselves.
        out = function(*((x * 1).transpose(1, 2) for x in leaves), cos, sin)
        grads = torch.autograd.grad(out, leaves, [g.clone() for g in upstream])
        results.append([*out, *grads])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3", "gemma2"])
def test_real_liger_equals_transformers(name: str) -> None:
    pytest.importorskip("liger_kernel")
    tree = _tree().to("cuda")
    upstream = torch.randn(len(tree.group_of_sequence), device="cuda")
    results = []
    for liger in (False, True):
        model = tiny_model(name)
        if liger:
            apply_liger(model)
        adapted = with_lora(model).cuda()
        logps = sequence_logps(adapted, tree)
        logps.backward(upstream)
        results.append({"logps": logps.detach(), **gradients(adapted)})
    for key, expected in results[0].items():
        bound = 1e-4 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(results[1][key], expected, rtol=0, atol=bound, msg=key)
