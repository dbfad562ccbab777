"""Weights of a reward model as Starling-RM-7B-alpha publishes them: a language model, a value head.

    model.model.*, model.lm_head.*    the causal language model it was trained from
    transformer.*                     the first of these once more, sharing its storage
    v_head.weight [1, hidden]         the head: no bias, read at one position

Renamed, they are transformers' sequence classification with one label, without the output layer.
Tensors stay where they are on the disk (memory-mapped) until the loader takes one by one, so that
no second copy of a model is ever held. Pickles are read by PyTorch's restricted loader alone, which
runs no code from them.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from scmini.errors import DataError
from scmini.models.checkpoint_files import is_file
from scmini.quoting import plain, quoted

HEAD = "v_head.weight"
BODIES = ("model.model.", "transformer.", "model.")
"""Prefixes of the language model without its output layer; the first that is there is read."""
LEFT_OUT = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
"""Endings of constants that old versions of transformers saved as weights."""
SAFETENSORS, PICKLE = ".safetensors", (".bin", ".pt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "adapter_", "consolidated")


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold a model's weights, safetensors before pickles.

    Raises:
        DataError: none, or one that an index names is missing.
    """
    for name in INDEXES:
        if (folder / name).is_file():
            return _indexed(folder / name)
    files = sorted(p for p in folder.iterdir() if p.is_file())
    files = [p for p in files if not p.name.startswith(NOT_WEIGHTS)]
    found = [p for p in files if p.suffix == SAFETENSORS]
    if not found:
        found = [p for p in files if p.name.endswith("model.bin")]
    found = found or [p for p in files if p.suffix in PICKLE]
    if not found:
        raise DataError(
            f"{folder}: no weights (*.safetensors, *.bin or *.pt); fetch or copy the model again"
        )
    return found


def _indexed(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{index}: not an index of weight files; fetch or copy it again") from None
    for path in files:
        if path.parent != index.parent or path.name in ("", ".."):
            raise DataError(f"{index}: {quoted(str(path))} is no file beside it; fetch it again")
        if not is_file(path):
            shown = index.parent / plain(path.name, 80)
            raise DataError(
                f"{shown} is missing, but {index.name} names it; fetch or copy it again"
            )
    return files


def read(files: Sequence[Path]) -> dict[str, Tensor] | None:
    """All tensors of some files, memory-mapped, if they are of this layout; else None.

    Raises:
        DataError: a file is damaged, holds something else than tensors by name, or is a pickle that
            the restricted loader refuses.
    """
    if all(path.suffix == SAFETENSORS for path in files):
        names = {name for path in files for name in _names(path)}
        if not _has_value_head(names):
            return None
    found: dict[str, Tensor] = {}
    for path in files:
        found |= _read_safetensors(path) if path.suffix == SAFETENSORS else _read_pickle(path)
    return found if _has_value_head(found) else None


def _has_value_head(names: Collection[str]) -> bool:
    # In a sequence classification, whose head is `score`, a v_head would be left from training.
    return HEAD in names and "score.weight" not in names


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        mmap = zipfile.is_zipfile(path)  # files from before PyTorch 1.6 are not, and are read whole
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: not loaded, because it holds more than tensors or is damaged "
            f"({_first_line(error)}); fetch or copy it again, or convert it to safetensors where "
            "you trust it with running its code"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may break the loader anywhere
        raise _broken(path, error) from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise DataError(
            f"{path}: expected tensors by name (a state dict), got {type(found).__name__}; save "
            "model.state_dict() alone"
        )
    return found


def sequence_classification_weights(
    weights: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """The same tensors under the names of transformers' sequence classification.

    Args:
        weights: of this layout; the output layer and one of two equal bodies are left out.
        source: where they came from, for messages.

    Raises:
        DataError: no body, two that differ, or a head of another shape or with a bias.
    """
    head = weights[HEAD]
    if head.ndim != 2 or head.shape[0] != 1 or "v_head.bias" in weights:
        kind = f"shape {tuple(head.shape)}" + (" and a bias" if "v_head.bias" in weights else "")
        raise DataError(f"{source}: {HEAD} has {kind}; expected [1, hidden size] without bias")
    there = [prefix for prefix in BODIES if f"{prefix}embed_tokens.weight" in weights]
    if not there:
        raise DataError(
            f"{source}: has {HEAD}, but no weights {BODIES[0]}* or {BODIES[1]}* of a Llama"
        )
    norms = [weights[name] for p in there[:2] if (name := f"{p}norm.weight") in weights]
    if len(norms) == 2 and not torch.equal(*norms):
        raise DataError(
            f"{source}: {there[0]}* and {there[1]}* differ, but should be the same model twice"
        )
    found = {"score.weight": head}
    for name, tensor in weights.items():
        if name.startswith(there[0]) and not name.endswith(LEFT_OUT):
            found["model." + name.removeprefix(there[0])] = tensor
    return found


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot be read ({_first_line(error)}): damaged or not wholly fetched; fetch or "
        "copy it again"
    )


def _first_line(error: Exception) -> str:
    return plain((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
