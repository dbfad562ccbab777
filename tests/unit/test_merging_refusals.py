"""What cannot be merged, and the sentence that says why."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import change_json
from safetensors.torch import load_file, save_file

from scmini.errors import DataError
from scmini.models.merging import merge_adapter
from scmini.sections import ModelConfig


def quantised(base: Path, adapter: Path) -> None:
    change_json(base / "config.json", quantization_config={"load_in_4bit": True})


def dora(base: Path, adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", use_dora=True)


def biased(base: Path, adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", bias="all")


def another_method(base: Path, adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", peft_type="IA3")


def change_weights(path: Path, **changes: Any) -> None:
    values = load_file(path)
    for name, value in changes.items():
        key = next(key for key in values if name in key.replace(".", "_"))
        if value is None:
            del values[key]
        else:
            values[key] = value(values[key])
    save_file(values, path, metadata={"format": "pt"})


def saved_module(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.ones(3, 4)}, path)


def half_a_pair(base: Path, adapter: Path) -> None:
    change_weights(adapter / "adapter_model.safetensors", lora_B=None)


def wrong_shape(base: Path, adapter: Path) -> None:
    change_weights(adapter / "adapter_model.safetensors", lora_B=lambda b: b[:-1].contiguous())


def other_base(base: Path, adapter: Path) -> None:
    change_weights(base / "model.safetensors", layers_1_mlp_down_proj=None)


def not_finite(base: Path, adapter: Path) -> None:
    change_weights(adapter / "adapter_model.safetensors", lora_A=lambda a: a * float("nan"))


def too_large(base: Path, adapter: Path) -> None:
    change_weights(base / "model.safetensors", embed_tokens=lambda e: e + 1e6)


def torn_base(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")


def torn_adapter(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 20)


def eight_bits(base: Path, adapter: Path) -> None:
    change_weights(base / "model.safetensors", q_proj=lambda q: q.to(torch.float8_e4m3fn))


def pickled(base: Path, adapter: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def index_of(base: Path, **where: Any) -> None:
    (base / "model.safetensors").rename(base / "a.safetensors")
    names = load_file(base / "a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "a.safetensors") | where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_file(base: Path, adapter: Path) -> None:
    index_of(base, extra="b.safetensors")


def missing_tensor(base: Path, adapter: Path) -> None:
    index_of(base, extra="a.safetensors")


def outside_file(base: Path, adapter: Path) -> None:
    index_of(base, extra="../a.safetensors")


def damaged_index(base: Path, adapter: Path) -> None:
    index_of(base, extra=None)


def tied_head(base: Path, adapter: Path) -> None:
    change_json(base / "config.json", tie_word_embeddings=True)
    path = adapter / "adapter_model.safetensors"
    rows = load_file(base / "model.safetensors")["lm_head.weight"].shape[0]
    head = "base_model.model.lm_head.lora_"
    pair = {f"{head}A.weight": torch.ones(4, 64), f"{head}B.weight": torch.ones(rows, 4)}
    save_file(load_file(path) | pair, path)


BROKEN = [
    (quantised, r"config\.json: .*quantised \(quantization_config\).*unquantised"),
    (dora, r"use_dora cannot be merged"),
    (biased, r"bias: all cannot be merged"),
    (another_method, r"peft_type: IA3 cannot be merged"),
    (saved_module, r"lm_head\.weight is no pair of LoRA factors"),
    (half_a_pair, r"is no pair of LoRA factors"),
    (wrong_shape, r"not made for the base model .*rank 4: .*for a weight of"),
    (other_base, r"not made for the base model .*no layer for .*layers\.1\.mlp\.down_proj"),
    (not_finite, r"values that are not finite"),
    (too_large, r"embed_tokens\.weight has values up to 1e\+06, too large .*bfloat16"),
    (torn_base, r"model\.safetensors: damaged"),
    (torn_adapter, r"adapter_model\.safetensors: damaged"),
    (eight_bits, r"is stored as F8_E4M3.*unquantised"),
    (pickled, r"no weights in safetensors.*save_pretrained"),
    (missing_file, r"b\.safetensors: missing; fetch"),
    (missing_tensor, r"extra is missing; fetch"),
    (outside_file, r"'\.\./a\.safetensors' is no name of a file beside it"),
    (damaged_index, r"index\.json: damaged; fetch"),
    (tied_head, r"changes lm_head, which the base model ties"),
]


@pytest.mark.parametrize(("spoil", "said"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_what_cannot_be_merged_says_so(
    spoil: Any, said: str, source: Path, adapter: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(source, tmp_path / "base"))
    spoil(base, adapter)
    half = ModelConfig(load_in_4bit=False, dtype="float16")
    with pytest.raises(DataError, match=said):
        merge_adapter(half, str(base), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
