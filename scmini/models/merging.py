"""An adapter merged into its base weights, from file to file: a checkpoint that any engine serves.

The base is read in the precision it was published in, never through NF4. One tensor is in memory at
a time: W + scale * B @ A in float32, rounded once to the precision of the result.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from scmini.errors import DataError, EnvironmentProblem
from scmini.models.checkpoint_files import (
    FLOATS,
    Stored,
    read_tensor,
    readable,
    sharded,
    stored_tensors,
    write_checkpoint,
    write_json,
)
from scmini.models.loading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_adapter_folder,
    checkpoint_folder,
    load_tokenizer,
    misfit,
    reading,
)
from scmini.models.sampler import end_tokens
from scmini.sections import ModelConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MORE_THAN_LORA = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "modules_to_save"),
    *("alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "target_parameters"),
    *("trainable_token_indices", "kasa_config", "velora_config", "monteclora_config"),
)
"""Keys of PEFT's LoraConfig under which a layer is more, or other, than W + scale * B @ A."""
_PREFIX = "base_model.model."
_SPARE = 64 << 20


@dataclass(frozen=True)
class _Delta:
    """What an adapter adds to one weight: the names of its factors, and their scale."""

    module: str
    scale: float

    @property
    def a(self) -> str:
        return f"{_PREFIX}{self.module}.lora_A.weight"

    @property
    def b(self) -> str:
        return f"{_PREFIX}{self.module}.lora_B.weight"


def merge_adapter(config: ModelConfig, source: str, adapter: Path, out: Path) -> Path:
    """Write base plus adapter to the folder `out`, in `config.dtype`; kept where it is there.

    Returns:
        `out`, with model and tokenizer. It is there whole or not at all.

    Raises:
        As `write_merged`.
    """
    if out.is_dir():
        return out
    torn = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(torn, ignore_errors=True)
    torn.mkdir(parents=True)
    write_merged(config, source, adapter, torn, dtype=config.dtype)
    os.replace(torn, out)
    return out


def write_merged(
    config: ModelConfig,
    source: str,
    adapter: Path,
    folder: Path,
    *,
    dtype: str,
    max_shard_bytes: int | None = None,
) -> None:
    """Write base plus adapter: weights, configurations and the adapter's tokenizer, synced.

    Args:
        source: folder or hub name of the base model.
        adapter: PEFT folder of plain LoRA; rank and alpha patterns and rsLoRA included.
        folder: an empty folder.
        dtype: bfloat16, float16 or float32, of every weight of the result.
        max_shard_bytes: largest weight file, single tensors excepted; None keeps the base's files.

    Raises:
        DataError: the adapter does not fit the base or is more than LoRA; the base is quantised or
            incomplete; a value does not fit `dtype`.
        EnvironmentProblem: the base cannot be fetched, or the disk has no room.
    """
    base = checkpoint_folder(config, source)
    settings = _read_config(base)
    rank = check_adapter_folder(adapter)
    generation = _generation_config(base, adapter)
    tensors = [
        replace(tensor, kind=_KINDS[dtype]) if tensor.kind in FLOATS else tensor
        for tensor in stored_tensors(base)
    ]
    with readable(adapter / ADAPTER_WEIGHTS) as factors:
        deltas = _deltas(adapter, factors)
        try:
            _check_deltas(tensors, deltas, factors, settings)
        except ValueError as error:
            raise DataError(misfit(adapter, source, f"rank {rank}: {error}")) from None
        check_room(folder, sum(tensor.nbytes for tensor in tensors), "the merged model")
        merger = _Merger(base, adapter, factors, deltas, getattr(torch, dtype))
        write_checkpoint(folder, sharded(tensors, max_shard_bytes), merger.tensor)
    copy_tokenizer(adapter, folder)
    write_json(folder / CONFIG, _config_of(settings, dtype))
    write_json(folder / GENERATION, generation)


def copy_tokenizer(adapter: Path, folder: Path) -> None:
    """The tokenizer and chat template of an adapter, without what is about this machine.

    transformers 5 calls every fast tokenizer by a new class name; the old one is known to both.
    """
    for path in sorted(p for p in adapter.rglob("*") if p.is_file()):
        name = path.relative_to(adapter)
        if name.as_posix() not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
            with open(folder / name, "rb") as handle:
                os.fsync(handle.fileno())
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        for key in ("is_local", "local_files_only", "name_or_path"):
            settings.pop(key, None)
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(path, settings)


def check_room(folder: Path, needed: int, what: str) -> None:
    """EnvironmentProblem if the disk of a folder has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise EnvironmentProblem(
            f"{folder.parent}: {what} needs {(needed + _SPARE) / 1e9:.1f} GB and the disk has "
            f"{free / 1e9:.1f} GB free; free some space, or name a folder on another disk"
        )


def _read_config(base: Path) -> dict[str, Any]:
    """config.json of a base in full precision."""
    path = base / CONFIG
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no configuration of a model ({error})") from None
    for part in (settings, settings.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                raise DataError(
                    f"{path}: the base is stored quantised ({key}); an adapter is merged into full "
                    "precision only: name the unquantised model in model.model_name_or_path"
                )
    return settings


def _deltas(adapter: Path, factors: Any) -> dict[str, _Delta]:
    """By name of a base weight, what is added to it; every tensor of the adapter is in one."""
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    refused = [key for key in _MORE_THAN_LORA if settings.get(key)]
    if settings.get("peft_type") != "LORA":
        refused.append(f"peft_type: {settings.get('peft_type')}")
    if settings.get("bias", "none") != "none":
        refused.append(f"bias: {settings['bias']}")
    if refused:
        raise DataError(f"{adapter / ADAPTER_CONFIG}: {refused[0]} cannot be merged, only LoRA can")
    names = set(factors.keys())
    found = {}
    for name in sorted(names):
        module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        delta = _Delta(module, _scale(settings, module, factors.get_slice(name).get_shape()))
        if name == delta.a and delta.b in names:
            found[f"{module}.weight"] = delta
    strange = names - {factor for delta in found.values() for factor in (delta.a, delta.b)}
    if strange:
        raise DataError(
            f"{adapter / ADAPTER_WEIGHTS}: {min(strange)} is no pair of LoRA factors of a weight; "
            "only plain LoRA can be merged"
        )
    return found


def _scale(settings: Mapping[str, Any], module: str, shape: Sequence[int]) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, with the patterns of PEFT's configuration.

    Args:
        shape: of the factor A, [r, inputs].
    """
    rank = max(shape[0] if shape else 1, 1)
    alphas = settings.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), settings.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _check_deltas(
    tensors: Sequence[Stored],
    deltas: Mapping[str, _Delta],
    factors: Any,
    settings: Mapping[str, Any],
) -> None:
    """ValueError for what the adapter has and the base has not, or in another shape."""
    shapes = {tensor.name: tensor.shape for tensor in tensors if tensor.kind in FLOATS}
    for name, delta in deltas.items():
        if name not in shapes:
            raise ValueError(f"the base model has no layer for {delta.a}")
        a, b = (tuple(factors.get_slice(factor).get_shape()) for factor in (delta.a, delta.b))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or shapes[name] != (b[0], a[1]):
            raise ValueError(f"{delta.module}: B {b} and A {a} for a weight of {shapes[name]}")
    # To add to one of two tied weights would untie them.
    if settings.get("tie_word_embeddings") and "lm_head.weight" in deltas:
        raise ValueError("it changes lm_head, which the base model ties to its embeddings")


class _Merger:
    """Makes the tensors of the result, one at a time."""

    def __init__(
        self,
        base: Path,
        adapter: Path,
        factors: Any,
        deltas: Mapping[str, _Delta],
        dtype: torch.dtype,
    ) -> None:
        self.base, self.adapter, self.factors = base, adapter, factors
        self.deltas, self.dtype = deltas, dtype

    def tensor(self, planned: Stored) -> Tensor:
        """A tensor of the base, changed where the adapter has a say, and rounded."""
        weight = read_tensor(self.base, planned)
        if planned.kind not in FLOATS:
            return weight
        if planned.name in self.deltas:
            weight = self._sum(weight.float(), self.deltas[planned.name])
        rounded = weight.to(self.dtype)
        if not rounded.isfinite().all() and weight.isfinite().all():
            raise DataError(
                f"{self.base / planned.file}: {planned.name} has values up to "
                f"{float(weight.abs().max()):.3g}, too large for {self.dtype}; take bfloat16"
            )
        return rounded

    def _sum(self, weight: Tensor, delta: _Delta) -> Tensor:
        a, b = (self.factors.get_tensor(name).float() for name in (delta.a, delta.b))
        product: Tensor = b @ a
        if not product.isfinite().all():
            raise DataError(
                f"{self.adapter / ADAPTER_WEIGHTS}: {delta.module} has values that are not finite"
            )
        return product.mul_(delta.scale).add_(weight)


def _config_of(settings: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with the precision of the result; this and rope_theta under their old names too.

    llama.cpp and transformers 4 would take 10,000 for a rope_theta that they do not find.
    """
    made = {key: value for key, value in settings.items() if key != "_name_or_path"}
    made |= {"dtype": dtype, "torch_dtype": dtype}
    rope = made.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type") == "default" and "rope_theta" in rope:
        made.setdefault("rope_theta", rope["rope_theta"])
    if isinstance(made.get("text_config"), dict):
        made["text_config"] = made["text_config"] | {"dtype": dtype}
    return made


def _generation_config(base: Path, adapter: Path) -> dict[str, Any]:
    """That of the base, with every token that ends an answer, the chat template's included."""
    with reading(str(base)):
        made: Any = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(base, trust_remote_code=False)
        )
    if (base / GENERATION).is_file():
        settings: dict[str, Any] = json.loads((base / GENERATION).read_text(encoding="utf-8"))
        made.eos_token_id = settings.get("eos_token_id", made.eos_token_id)
    else:
        settings = made.to_diff_dict()
    if ends := end_tokens(load_tokenizer(str(adapter)), made):
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    settings.pop("_from_model_config", None)
    return settings
