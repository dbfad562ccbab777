"""Checkpoints as files: their tensors listed without reading them, and written one by one.

transformers' own way needs all tensors of a file in memory at once, and a 7B model may be one file.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmini.console import say
from scmini.errors import DataError
from scmini.quoting import plain, quoted
from scmini.store import write_atomic

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""What safetensors calls the kinds of weights, with bytes per element."""
OTHERS = {
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1},
    **{"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    name: str
    file: str
    """In which it is, in the folder of the checkpoint."""
    shape: tuple[int, ...]
    kind: str
    """Its dtype, as safetensors calls it."""

    @property
    def itemsize(self) -> int:
        return (FLOATS | OTHERS)[self.kind]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def stored_tensors(folder: Path) -> Iterator[Stored]:
    """Every tensor of a checkpoint in safetensors, file by file.

    Raises:
        DataError: the checkpoint is incomplete or damaged, or has a kind of numbers that is neither
            in `FLOATS` nor in `OTHERS`.
    """
    for file, names in weight_files(folder).items():
        with readable(folder / file) as handle:
            there = set(handle.keys())
            for name in names or sorted(there):
                if name not in there:
                    raise DataError(f"{folder / file}: {name} is missing; fetch the model again")
                tensor = handle.get_slice(name)
                if tensor.get_dtype() not in FLOATS | OTHERS:
                    raise DataError(
                        f"{folder / file}: {name} is stored as {tensor.get_dtype()}; only full "
                        "precision will do here: name the unquantised model"
                    )
                yield Stored(name, file, tuple(tensor.get_shape()), tensor.get_dtype())


def weight_files(folder: Path) -> dict[str, list[str]]:
    """Weight files of a checkpoint in safetensors, with the tensors that count (none: all of them).

    Raises:
        DataError: none, one that is missing, or an index that is damaged or points elsewhere.
    """
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: []}
    try:
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str]] = {file: [] for file in sorted(where.values())}
        for name, file in sorted(where.items()):
            files[file].append(name)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no weights in safetensors; name the folder of a model, or convert pickled "
            "weights with transformers' save_pretrained"
        ) from None
    except OSError as error:
        raise DataError(f"{folder / INDEX}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{folder / INDEX}: damaged; fetch the model again") from None
    if not files:
        raise DataError(f"{folder / INDEX}: names no weights; fetch the model again")
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f"{folder / INDEX}: {quoted(file)} is no name of a file beside it")
        if not is_file(folder / file):
            raise DataError(f"{folder / plain(file, 80)}: missing; fetch the model again")
    return files


def is_file(path: Path) -> bool:
    """`path.is_file()` for a name that anybody may have written."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file could have
        return False


@contextmanager
def readable(path: Path) -> Iterator[Any]:
    """An open safetensors file; `DataError` for one that is damaged or may not be read."""
    try:
        handle = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None
    try:
        with handle as opened:
            yield opened
    except SafetensorError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: damaged ({plain(error)}); fetch it again")


def read_tensor(folder: Path, tensor: Stored) -> Tensor:
    """A tensor of a checkpoint. The file is opened for it alone, so no other stays in memory."""
    with readable(folder / tensor.file) as handle:
        found: Tensor = handle.get_tensor(tensor.name)
    return found


def sharded(tensors: Sequence[Stored], max_bytes: int | None) -> dict[str, list[Stored]]:
    """Tensors by the file that they are to be in.

    Args:
        max_bytes: largest file, where no single tensor is larger; None: each in its old file.
    """
    if max_bytes is None:
        files: dict[str, list[Stored]] = {}
        for tensor in tensors:
            files.setdefault(tensor.file, []).append(tensor)
        return files
    shards: list[list[Stored]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    stem, total = WEIGHTS.removesuffix(".safetensors"), len(shards)
    names = (f"{stem}-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1))
    return dict(zip(names, shards, strict=True))


def write_checkpoint(
    folder: Path, shards: Mapping[str, Sequence[Stored]], make: Callable[[Stored], Tensor]
) -> None:
    """Weight files and, unless it is the one usual file, their index; all synced.

    Args:
        shards: name of a file -> its tensors, with shape and kind as they are to be.
        make: gives a tensor; it is written before the next is asked for.
    """
    for number, (name, tensors) in enumerate(shards.items(), 1):
        if len(shards) > 1:
            say(f"writing weights: file {number} of {len(shards)}")
        _write_file(folder / name, tensors, make)
    if list(shards) != [WEIGHTS]:
        where = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / INDEX, index)


def _write_file(path: Path, tensors: Sequence[Stored], make: Callable[[Stored], Tensor]) -> None:
    """A safetensors file.

    The layout: length of the header (u64), header (JSON, padded with spaces to 8 bytes), tensors
    without gaps. Wider elements come first, so that all are aligned.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        span = [at, at + tensor.nbytes]
        header[tensor.name] = {
            **{"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": span}
        }
        at = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            out.write(make(tensor).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file as transformers writes them, whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
