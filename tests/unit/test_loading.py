"""Loading: NF4 on the CPU, adapters, and what a person reads when something is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from training_helpers import gradients, response_groups, tiny_model, tiny_tokenizer, write_model

from scmini.config import Config
from scmini.errors import ConfigError, DataError, EnvironmentProblem
from scmini.models import loading, qlora
from scmini.models.attention import sequence_logps
from scmini.sections import ModelConfig, SFTConfig, recipe_section
from scmini.training.scoring import tolerance
from scmini_kernels import PrefixTree

PLAIN = ModelConfig(load_in_4bit=False, dtype="float32")
SFT = SFTConfig(lora_r=4, lora_alpha=8)
NF4 = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def adapter(source: str, tmp_path: Path) -> Path:
    model = loading.fresh_adapter(PLAIN, source, SFT, seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loading.save_adapter(model, tmp_path / "adapter", None)
    return tmp_path / "adapter"


def _tree() -> PrefixTree:
    return PrefixTree.pack([group.sequences for group in response_groups([2, 3])])


def _grads(model: torch.nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    sequence_logps(model, _tree()).sum().backward()
    return gradients(model)


@pytest.mark.parametrize("dtype", NF4)
def test_nf4_gradients_survive_a_forward_in_eval_mode(
    dtype: str, source: str, adapter: Path
) -> None:
    """bitsandbytes may repack the weights in place there, and backward then is wrong, silently."""
    config = ModelConfig(load_in_4bit=True, dtype=dtype)
    model = loading.load_policy(config, source, adapter, trainable=True)
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers, "nothing was quantised"
    assert not any(m.support_avx512bf16_for_cpu for m in layers)
    model.train()
    clean = _grads(model)
    model.eval()
    with torch.no_grad():
        sequence_logps(model, _tree())
    model.train()
    after = _grads(model)
    assert set(clean) == set(after)
    for key, grad in clean.items():
        torch.testing.assert_close(after[key], grad, rtol=0, atol=0, msg=key)
        assert grad.abs().max() > 0, key


@pytest.mark.parametrize("dtype", NF4)
def test_nf4_shapes_and_dtypes(dtype: str, source: str) -> None:
    import bitsandbytes as bnb

    config = ModelConfig(load_in_4bit=True, dtype=dtype)
    model = loading.fresh_adapter(config, source, SFT, seed=0)
    linear = [m for m in model.modules() if type(m) is bnb.nn.Linear4bit]
    assert len(linear) == 14
    for module in linear:
        assert module.weight.quant_type == "nf4"
        assert module.weight.quant_state.nested, "double quantisation is off"
        assert module.compute_dtype == getattr(torch, dtype)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    inner = model.get_base_model()
    assert inner.get_output_embeddings().weight.dtype == getattr(torch, dtype)


def test_nf4_generation_has_the_same_weights(source: str, adapter: Path) -> None:
    """Decoded once for the CPU: the same log-probabilities as the policy that is trained."""
    config = ModelConfig(load_in_4bit=True, dtype="float32")
    policy = loading.load_policy(config, source, adapter, trainable=False)
    fast = loading.load_for_generation(config, source, adapter)
    assert not any("4bit" in type(m).__name__ for m in fast.modules())
    with torch.no_grad():
        expected, found = sequence_logps(policy, _tree()), sequence_logps(fast, _tree())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    unquantised = loading.load_for_generation(PLAIN, source, adapter)
    with torch.no_grad():
        assert (sequence_logps(unquantised, _tree()) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("quantised", [True, False])
def test_generation_in_16_bits_keeps_the_adapter(
    quantised: bool, source: str, adapter: Path
) -> None:
    config = ModelConfig(load_in_4bit=quantised, dtype="bfloat16")
    fast = loading.load_for_generation(config, source, adapter)
    assert any("lora_A" in name for name, _ in fast.named_parameters())
    policy = loading.load_policy(config, source, adapter, trainable=False)
    with torch.no_grad():
        expected, found = sequence_logps(policy, _tree()), sequence_logps(fast, _tree())
        with policy.disable_adapter():
            without = sequence_logps(policy, _tree())
    lengths = [n for group in response_groups([2, 3]) for n in group.num_scored]
    allowed = [tolerance(x, n, True) for x, n in zip(expected.tolist(), lengths, strict=True)]
    assert ((found - expected).abs() <= torch.tensor(allowed)).all()
    assert ((without - expected).abs() > torch.tensor(allowed)).any(), "the adapter is not seen"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_decodes(dtype: str, source: str, adapter: Path) -> None:
    fast = loading.load_for_generation(ModelConfig(dtype=dtype), source, adapter)
    assert fast.config._attn_implementation == "sdpa"
    out = fast.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 3


def test_fresh_adapter_depends_on_its_seed_alone(source: str) -> None:
    torch.manual_seed(99)
    one = loading.fresh_adapter(PLAIN, source, SFT, seed=1)
    state = torch.get_rng_state()
    two = loading.fresh_adapter(PLAIN, source, SFT, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers were used"
    other = loading.fresh_adapter(PLAIN, source, SFT, seed=2)

    def weights(model: PeftModel) -> Tensor:
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))
    with torch.no_grad():
        base = sequence_logps(loading.load_base(PLAIN, source), _tree())
        torch.testing.assert_close(sequence_logps(one, _tree()), base, rtol=0, atol=1e-6)


def test_policy_is_a_trainable_copy(source: str, adapter: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    model = loading.load_policy(PLAIN, source, adapter, trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    frozen = loading.load_policy(PLAIN, source, adapter, trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    loading.save_adapter(frozen, tmp_path / "again", None)
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == before


def test_saved_adapter_opens_in_peft(source: str, adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    base = loading.load_base(PLAIN, source)
    plain = PeftModel.from_pretrained(base, str(adapter))
    ours = loading.load_policy(PLAIN, source, adapter, trainable=False)
    with torch.no_grad():
        torch.testing.assert_close(sequence_logps(plain, _tree()), sequence_logps(ours, _tree()))


def test_adapter_of_another_model(source: str, adapter: Path, tmp_path: Path) -> None:
    other = tiny_model()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"not made for the base model.*model_name_or_path"):
        loading.load_policy(PLAIN, str(tmp_path / "other"), adapter, trainable=True)


def test_adapter_with_too_many_layers(source: str, adapter: Path, tmp_path: Path) -> None:
    """PEFT loads it without a word."""
    folder = tmp_path / "short"
    _copy(Path(source), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["num_hidden_layers"] = 1
    settings.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"the base model has no layer for .*layers\.1"):
        loading.load_policy(PLAIN, str(folder), adapter, trainable=True)


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_adapter_folder_without_weights(source: str, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match=r"adapter_model.safetensors is missing"):
        loading.load_policy(PLAIN, source, adapter, trainable=True)


def test_torn_adapter(source: str, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match=r"adapter_model.safetensors|not made for"):
        loading.load_policy(PLAIN, source, adapter, trainable=True)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model.model_name_or_path.*does not exist"):
        loading.load_base(PLAIN, str(tmp_path / "nowhere"))


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model.model_name_or_path"):
        loading.load_base(PLAIN, str(tmp_path))


def test_pickled_weights_are_refused(source: str, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    _copy(Path(source), folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        loading.load_base(PLAIN, str(folder))


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = "nobody-at-all/no-such-model"
    with pytest.raises(
        EnvironmentProblem, match=rf"model.model_name_or_path: {name}.*give the folder"
    ):
        loading.load_base(PLAIN, name)
    with pytest.raises(EnvironmentProblem, match=name):
        loading.load_tokenizer(name)


@pytest.mark.parametrize("quantised", [False, True])
def test_policies_are_fused(
    quantised: bool, source: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policies that are trained or score whole rows; those that decode token by token are not."""
    config = ModelConfig(load_in_4bit=quantised, dtype="bfloat16")
    calls: list[int] = []
    apply = qlora._LoraLinear.apply
    monkeypatch.setattr(qlora._LoraLinear, "apply", lambda *x: (calls.append(1), apply(*x))[1])

    def fused(model: torch.nn.Module) -> int:
        calls.clear()
        with torch.no_grad():
            sequence_logps(model, _tree().to(loading.device()))
        return len(calls)

    assert fused(loading.fresh_adapter(config, source, SFT, seed=0)) == 14
    for trainable in (True, False):
        assert fused(loading.load_policy(config, source, adapter, trainable=trainable)) == 14
    assert fused(loading.load_for_generation(config, source, adapter)) == 0


@pytest.mark.parametrize(
    "choice", [{"attn_implementation": "flash_attention_2"}, {"use_liger_kernel": True}]
)
def test_chosen_kernels_are_checked_before_reading(
    choice: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = ModelConfig(load_in_4bit=False, dtype="bfloat16", **choice)
    with pytest.raises(EnvironmentProblem, match=next(iter(choice))):
        loading.load_policy(config, str(tmp_path / "nowhere"), None, trainable=False)


def test_chosen_kernels_enter_no_recipe() -> None:
    chosen = ModelConfig(attn_implementation="flash_attention_2", use_liger_kernel=True)
    assert recipe_section(chosen) == recipe_section(ModelConfig())
    with pytest.raises(ValueError, match="dtype"):
        ModelConfig(attn_implementation="flash_attention_2", dtype="float32")


@pytest.mark.parametrize("modules", [["no_such_layer"], ["q_proj", "lm_head"]])
def test_target_modules_that_do_not_fit(modules: list[str], source: str) -> None:
    sft = SFTConfig(lora_r=4, lora_target_modules=modules)
    with pytest.raises(ConfigError, match=r"lora_target_modules"):
        loading.fresh_adapter(PLAIN, source, sft, seed=0)


def test_source() -> None:
    named = Config(model={"model_name_or_path": "a/b"}, data={"format": "zoo"})
    assert loading.model_source(named, {}) == "a/b"
    assert loading.model_source(Config(), {"base": Path("/x")}) == "/x/model"


def test_tokenizer(source: str) -> None:
    tokenizer = loading.load_tokenizer(source)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer.eos_token == "<|im_end|>"
