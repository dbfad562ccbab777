"""Fused LoRA layers against PEFT's own forward, which is the slow twin."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training_helpers import gradients, tiny_model, with_lora

from scmini.models import qlora
from scmini.models.qlora import fuse_lora

K, N, RANK, ROWS = 34, 52, 5, 13
KINDS = ["plain", "bias", "nf4", "nf4-bias"]


class Wrapped(nn.Module):
    """Two layers, so that the second one's input needs a gradient."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(K, N, bias=bias)
        self.second = nn.Linear(N, K, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _model(
    kind: str, dtype: torch.dtype, device: torch.device | str = "cpu", **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    plain = Wrapped("bias" in kind)
    if "nf4" in kind:
        plain = _quantised(plain, dtype)
    plain = plain.to(dtype).to(device).requires_grad_(False)
    settings = {"r": RANK, "lora_alpha": 15, "target_modules": ["first", "second"], **options}
    model = get_peft_model(plain, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(device)


def _quantised(plain: Wrapped, dtype: torch.dtype) -> Wrapped:
    bnb = pytest.importorskip("bitsandbytes")
    for name in ("first", "second"):
        linear = getattr(plain, name)
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
        )
        layer.load_state_dict(linear.to(dtype).state_dict())
        layer.support_avx512bf16_for_cpu = False
        setattr(plain, name, layer.to(dtype))
    # bitsandbytes quantises when a layer is moved to a device.
    return plain.to("cuda" if torch.cuda.is_available() else "cpu")


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def _run(model: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = model(x)
    out.backward(upstream.to(out.dtype))
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **gradients(model)}


def _inputs(dtype: torch.dtype, *shape: int, features: int = K) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(*shape, features).to(dtype), torch.randn(*shape, features).to(dtype)


def _count_fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    apply = qlora._LoraLinear.apply

    def counted(*args: Any) -> Any:
        calls.append(1)
        return apply(*args)

    monkeypatch.setattr(qlora._LoraLinear, "apply", counted)
    return calls


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert value.abs().max() > 0, key
        error = (found[key] - value).abs().max() / value.abs().max()
        assert error <= bound, f"{key}: {error}"


@pytest.mark.parametrize("shape", [(ROWS,), (1, ROWS), (2, 3, 4), ()])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(
    kind: str, shape: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(kind, torch.float32, device)
    x, upstream = (t.to(device) for t in _inputs(torch.float32, *shape))
    expected = _run(model, x, upstream)
    calls = _count_fused(monkeypatch)
    assert fuse_lora(model) == 2
    found = _run(model, x, upstream)
    assert len(calls) == 2
    assert len(found) == 6
    _assert_close(found, expected, 5e-6)


def test_gradcheck() -> None:
    model = _model("bias", torch.float64)
    fuse_lora(model)
    x, _ = _inputs(torch.float64, 3)
    layer = _layers(model)[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.base_layer

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return qlora._LoraLinear.apply(x, a, b, base.weight, base.bias, 3.0)

    torch.autograd.gradcheck(function, (x.requires_grad_(), a, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bias", "nf4"])
def test_16_bits_within_budget(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Judged against the formula in plain PyTorch in the same dtype, fp64 being the truth."""
    layer = _layers(_model(kind, dtype, device))[0]
    base = layer.base_layer
    weight, bias = qlora._decoded(base.weight).clone(), base.bias
    scaling = layer.scaling["default"]
    x, upstream = _inputs(dtype, 200)[0], torch.randn(200, N)
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a, b, w = (t.to(x.dtype) for t in (a, b, weight))
        y = nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
        return y + (x @ a.t()) @ b.t() * scaling

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return qlora._LoraLinear.apply(x, a, b, base.weight, bias, scaling)

    # Adapter weights that the dtype can hold, so that all three start from the same numbers.
    rounded = [t.detach().to(dtype).float() for t in (a, b)]
    assert_within_budget(fused, plain, [x.to(device), *rounded], upstream.to(device))


def test_saves_the_input_and_one_row_of_rank_r() -> None:
    """What backward keeps of a bf16 NF4 layer, in bytes, parameters apart."""
    model = _model("nf4", torch.bfloat16)
    layer = _layers(model)[0]
    x, _ = _inputs(torch.bfloat16, ROWS)
    x.requires_grad_()
    parameters = {p.data_ptr() for p in model.parameters()}

    def saved() -> int:
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in parameters:
                kept[t.data_ptr()] = t
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            out = layer(x)
        assert out.requires_grad
        return sum(t.numel() * t.element_size() for t in kept.values())

    before = saved()
    fuse_lora(model)
    assert saved() == 2 * ROWS * (K + RANK)
    assert before >= 2 * saved()  # PEFT keeps both in float32


@pytest.mark.parametrize("which", ["x", "lora_A", "lora_B"])
def test_gradient_only_where_needed(which: str) -> None:
    model = _model("nf4", torch.float32)
    x, upstream = _inputs(torch.float32, ROWS)
    expected = _run(model, x, upstream)
    fuse_lora(model)
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(which in name)
    x.requires_grad_(which == "x")
    model(x).backward(upstream)
    found = gradients(model) | ({} if x.grad is None else {"x": x.grad})
    wanted = {key: value for key, value in expected.items() if which in key.split(".")}
    assert wanted
    _assert_close(found, wanted, 5e-6)


def _disabled(model: Any) -> None:
    for layer in _layers(model):
        layer.enable_adapters(False)


def _merged(model: Any) -> None:
    model.merge_adapter()


def _second_adapter(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first", "second"]))
    for layer in _layers(model):
        nn.init.normal_(layer.lora_B["other"].weight)
        layer.set_adapter(["default", "other"])


def _other_adapter(model: Any) -> None:
    """Active on the first layer alone, so the second has none that it knows."""
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first"]))
    model.set_adapter("other")


def _hooked(model: Any) -> None:
    layer = _layers(model)[0]
    layer.lora_A["default"].register_forward_hook(lambda *args: args[2] * 2)
    layer.base_layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))


@pytest.mark.parametrize("change", [_disabled, _merged, _second_adapter, _other_adapter, _hooked])
def test_state_that_peft_must_handle(change: Callable[[Any], None]) -> None:
    """The layers are fused before the state changes: each call decides anew."""
    twin, model = _model("bias", torch.float32), _model("bias", torch.float32)
    fuse_lora(model)
    x, _ = _inputs(torch.float32, ROWS)
    simple = model(x)
    for each in (twin, model):
        torch.manual_seed(4)
        change(each)
    # Those two leave one layer fused.
    bound = 1e-5 if change in (_other_adapter, _hooked) else 0
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=bound)
    if change is not _merged:
        assert not torch.allclose(model(x), simple, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}, {"use_rslora": True}],
)
def test_kinds_of_adapter(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    twin, model = (_model("bias", torch.float32, **options) for _ in range(2))
    fuse_lora(model)
    calls = _count_fused(monkeypatch)
    x, upstream = _inputs(torch.float32, ROWS)
    for training in (True, False):
        results = []
        for each in (twin.train(training), model.train(training)):
            torch.manual_seed(7)
            results.append(_run(each, x, upstream))
        _assert_close(results[1], results[0], 5e-6)
    # Two layers each time: rank-stabilised scaling is only a number, dropout is gone in eval.
    assert len(calls) == {"use_rslora": 4, "lora_dropout": 2}.get(next(iter(options)), 0)


def test_autocast_and_foreign_dtype_are_pefts() -> None:
    twin, model = _model("plain", torch.float32), _model("plain", torch.float32)
    fuse_lora(model)
    x, _ = _inputs(torch.float32, ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, twin(x), rtol=0, atol=0)
    quantised = _model("nf4", torch.bfloat16)
    expected = quantised(x)
    fuse_lora(quantised)
    torch.testing.assert_close(quantised(x), expected, rtol=0, atol=0)
    assert expected.dtype == torch.float32


def test_trainable_base_gets_its_gradient() -> None:
    twin, model = _model("bias", torch.float32), _model("bias", torch.float32)
    fuse_lora(model)
    x, upstream = _inputs(torch.float32, ROWS)
    for each in (twin, model):
        each.requires_grad_(True)
    found = _run(model, x, upstream)
    assert any("base_layer.weight" in key for key in found)
    _assert_close(found, _run(twin, x, upstream), 0.0)


def test_no_grad_and_odd_layouts() -> None:
    model = _model("nf4-bias", torch.float32)
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    x, upstream = _inputs(torch.float32, 3, ROWS)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    strided = torch.randn(3, K, ROWS).transpose(1, 2)
    assert not strided.is_contiguous()
    _assert_close(_run(fused, strided, upstream), _run(model, strided, upstream), 5e-6)
    once = torch.ones(()).expand(3, ROWS, K)
    _assert_close(_run(fused, x, once), _run(model, x, once), 5e-6)
    empty = torch.empty(0, K, requires_grad=True)
    fused(empty).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, K)


def test_output_may_be_changed_in_place() -> None:
    model = _model("plain", torch.float32)
    fuse_lora(model)
    x, upstream = _inputs(torch.float32, ROWS)
    out = model(x)
    out *= 2
    out.backward(upstream)
    found = gradients(model)
    model.zero_grad()
    (model(x) * 2).backward(upstream)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(found[key], grad)


def test_weights_changed_before_backward_are_noticed() -> None:
    model = _model("plain", torch.float32)
    fuse_lora(model)
    x, upstream = _inputs(torch.float32, ROWS)
    out = model(x)
    with torch.no_grad():
        _layers(model)[1].lora_B["default"].weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.backward(upstream)


def test_two_backwards_and_no_second_order() -> None:
    model = _model("nf4", torch.float32)
    fuse_lora(model)
    x, upstream = _inputs(torch.float32, ROWS)
    x.requires_grad_()
    out = model(x)
    first = torch.autograd.grad(out, x, upstream, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(out, x, upstream, retain_graph=True)[0], first)
    (grad,) = torch.autograd.grad(out, x, upstream.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_workspace_is_reused_and_grows() -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        small = qlora._workspace(device, torch.float16, 10)
    small.zero_()
    assert qlora._workspace(device, torch.float16, 7).data_ptr() == small.data_ptr()
    assert qlora._workspace(device, torch.float16, 10_000).numel() == 10_000
    assert qlora._workspace(device, torch.bfloat16, 10).dtype == torch.bfloat16
    for key in [k for k in qlora._workspaces if k[0] == device]:
        del qlora._workspaces[key]


def test_peft_notices_nothing(tmp_path: Path) -> None:
    model = with_lora(tiny_model())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    assert fuse_lora(model) == 14
    assert fuse_lora(model) == 0, "a second call must change nothing"
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == list(before)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model(input_ids=ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer, original = _layers(twin)[0], _layers(model)[0]
        assert layer.forward.args[0] is layer
        assert layer is not original
        torch.testing.assert_close(twin(input_ids=ids).logits, expected, rtol=0, atol=0)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
