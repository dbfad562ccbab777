"""Merging an adapter into its base: the same weights as PEFT, whatever the files, or a sentence."""

import itertools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import change_json, config, save_random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from training_helpers import MODELS, tiny_model, tiny_tokenizer, with_lora, write_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scmini.errors import EnvironmentProblem
from scmini.models import checkpoint_files, loading, merging
from scmini.models.checkpoint_files import Stored, sharded, stored_tensors, write_checkpoint
from scmini.models.merging import merge_adapter, write_merged
from scmini.sections import ModelConfig

PLAIN = ModelConfig(load_in_4bit=False, dtype="float32")


def merged(source: Path, adapter: Path, out: Path, dtype: str = "float32", **options: Any) -> Path:
    out.mkdir()
    write_merged(PLAIN, str(source), adapter, out, dtype=dtype, **options)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_equals_peft_to_the_bit(name: str, tmp_path: Path) -> None:
    base = tiny_model(name)
    base.save_pretrained(tmp_path / "base")
    policy = with_lora(base)
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    policy.save_pretrained(tmp_path / "adapter")
    found = tensors(merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))
    policy.merge_and_unload().save_pretrained(tmp_path / "peft")
    expected = tensors(tmp_path / "peft")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_patterns_and_rslora(rslora: bool, source: Path, tmp_path: Path) -> None:
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=rslora,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"q_proj": 2, r"model\.layers\.1\.mlp\.down_proj": 6},
        alpha_pattern={"v_proj": 3, "layers.0.self_attn.q_proj": 5},
    )
    policy: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(source), lora)
    for key, value in policy.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.1)
    policy.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "adapter")
    found = tensors(merged(source, tmp_path / "adapter", tmp_path / "out"))
    expected = policy.merge_and_unload().state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_the_sum_rounded_once(dtype: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_random_adapter(config(source), str(source), tmp_path / "adapter")
    exact = tensors(merged(source, adapter, tmp_path / "exact"))
    out = merged(source, adapter, tmp_path / "out", dtype)
    for key, value in tensors(out).items():
        assert torch.equal(value, exact[key].to(getattr(torch, dtype))), key
    settings = json.loads((out / "config.json").read_text())
    assert settings["dtype"] == settings["torch_dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(out).dtype == getattr(torch, dtype)


def test_any_sharding_holds_the_same(source: Path, adapter: Path, tmp_path: Path) -> None:
    whole = merged(source, adapter, tmp_path / "whole")
    parts = merged(source, adapter, tmp_path / "parts", max_shard_bytes=60_000)
    names = sorted(path.name for path in parts.glob("*.safetensors"))
    total = len(names)
    assert total > 2
    assert names == [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(whole).values())
    for key, file in index["weight_map"].items():
        with safe_open(parts / file, framework="pt") as handle:
            assert torch.equal(handle.get_tensor(key), tensors(whole)[key])
    model = AutoModelForCausalLM.from_pretrained(parts)
    expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    # A base in several files keeps them.
    again = merged(parts, adapter, tmp_path / "again")
    assert sorted(path.name for path in again.glob("*.safetensors")) == names


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}


@given(st.lists(st.tuples(SHAPES, st.sampled_from(sorted(KINDS))), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_written_files_are_read_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[tuple[int, ...], str]]
) -> None:
    folder = tmp_path_factory.mktemp("file")
    values = {
        f"t\u00e9{i}": (torch.rand(shape) * 9).to(KINDS[k]) for i, (shape, k) in enumerate(made)
    }
    planned = [Stored(f"t\u00e9{i}", "-", shape, kind) for i, (shape, kind) in enumerate(made)]
    write_checkpoint(folder, sharded(planned, 1 << 20), lambda tensor: values[tensor.name])
    found = load_file(folder / "model.safetensors")
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert {t.name: (t.shape, t.kind) for t in stored_tensors(folder)} == {
        t.name: (t.shape, t.kind) for t in planned
    }


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 60))
def test_shards_keep_their_limit(sizes: list[int], limit: int) -> None:
    planned = [Stored(str(i), "-", (size,), "U8") for i, size in enumerate(sizes)]
    shards = list(sharded(planned, limit).values())
    assert [tensor for shard in shards for tensor in shard] == planned
    for shard in shards:
        assert sum(t.nbytes for t in shard) <= limit or sum(t.nbytes > 0 for t in shard) == 1
    for left, right in itertools.pairwise(shards):
        assert sum(t.nbytes for t in left) + right[0].nbytes > limit, "no file is cut needlessly"


def test_one_tensor_in_memory_at_a_time(source: Path, adapter: Path, tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    make = merging._Merger.tensor

    def watched(self: Any, planned: Stored) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        made = make(self, planned)
        alive.append(weakref.ref(made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging._Merger, "tensor", watched)
        merged(source, adapter, tmp_path / "out")
    assert len(alive) > 10
    assert most == 0, "earlier tensors were gone when the next was made"


def test_the_merged_model_speaks_as_base_and_adapter(
    source: Path, adapter: Path, tmp_path: Path
) -> None:
    out = merge_adapter(PLAIN, str(source), adapter, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(5, 25)[None]
    plain = base(input_ids=ids).logits
    expected = PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=ids).logits
    found = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1
    text = "Who meets the cat? <|im_end|>"
    for folder in (out, adapter):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(source)(text).input_ids
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template
    kept = (out / "model.safetensors").stat().st_mtime_ns
    assert merge_adapter(PLAIN, str(source), adapter, out) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == kept, "what is there is kept"


@pytest.mark.parametrize(("given", "expected"), [(None, 2), (2, 2), (7, [2, 7]), ([9, 2], [2, 9])])
def test_every_token_that_ends_an_answer(
    given: Any, expected: Any, source: Path, adapter: Path, tmp_path: Path
) -> None:
    """The chat template's end token (2) and those that the base model ends with."""
    base = Path(shutil.copytree(source, tmp_path / "base"))
    (base / "generation_config.json").unlink()
    if given is not None:
        GenerationConfig(eos_token_id=given, do_sample=True, top_k=7).save_pretrained(base)
    out = merged(base, adapter, tmp_path / "out")
    found = GenerationConfig.from_pretrained(out)
    assert found.eos_token_id == expected
    assert found.top_k == (None if given is None else 7)


def test_rope_theta_has_its_old_name_too(source: Path, adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(source, tmp_path / "base"))
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    change_json(base / "config.json", rope_parameters=rope)
    out = merged(base, adapter, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 500000.0
    assert AutoConfig.from_pretrained(out).rope_parameters == rope


def test_new_class_names_of_transformers_5_are_not_exported(
    source: Path, adapter: Path, tmp_path: Path
) -> None:
    change_json(adapter / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    out = merged(source, adapter, tmp_path / "out")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "name_or_path"} & set(settings)


def test_no_room(
    source: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**7))
    with pytest.raises(EnvironmentProblem, match=r"needs 0\.1 GB and the disk has 0\.0 GB free"):
        merge_adapter(PLAIN, str(source), adapter, tmp_path / "out")


def test_a_kill_leaves_no_half_model(
    source: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def killed(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        written.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "_write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_adapter(PLAIN, str(source), adapter, tmp_path / "out")
    assert written
    assert not (tmp_path / "out").exists()
    out = merge_adapter(PLAIN, str(source), adapter, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out)
    assert not list(tmp_path.glob(".*")), "what the kill left is gone"


def test_a_base_on_the_hub(
    source: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(source)

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    named = ModelConfig(model_name_or_path="nobody/tiny", revision="v2", load_in_4bit=False)
    write_merged(named, "nobody/tiny", adapter, tmp_path, dtype="float32")
    assert asked == [("nobody/tiny", "v2")]

    def offline(name: str, **options: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(loading, "snapshot_download", offline)
    with pytest.raises(
        EnvironmentProblem, match=r"nobody/tiny could not be fetched.*hf auth login"
    ):
        write_merged(named, "nobody/tiny", adapter, tmp_path, dtype="float32")
