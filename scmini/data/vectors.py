"""Shards of vectors as the stage `embed` writes them: part-*.npy, with part-*.ids.json beside."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scmini.errors import DataError
from scmini.quoting import plain


def read_vectors_shard(path: Path) -> tuple[list[tuple[str, int]], Any]:
    """(id, rows) of the prompts of one part-*.npy in order, and its vectors.

    Returns:
        The vectors are [rows, dimensions] float16, read-only, and read from the file when they are
        used (a memory map).

    Raises:
        DataError: a file is damaged, or the two files of a shard do not fit together.
    """
    beside = path.with_suffix(".ids.json")
    try:
        groups = [(group["id"], group["rows"]) for group in read_listed(beside)]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{beside}: not readable ({plain(error)})") from None
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # NumPy parses the header like a program, and fails like one
        raise DataError(f"{path}: not readable ({plain(error)})") from None
    if vectors.ndim != 2 or vectors.dtype != np.float16:
        raise DataError(
            f"{path}: expected rows of float16, found {vectors.dtype} of shape {vectors.shape}"
        )
    if sum(rows for _, rows in groups) != len(vectors):
        raise DataError(f"{path}: {len(vectors)} vectors do not fit {beside.name}")
    return groups, vectors


def read_listed(path: Path, counts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """An .ids.json with id, rows and these counts; `ValueError` says what is wrong with it."""
    found = json.loads(path.read_bytes())
    if not isinstance(found, list):
        raise ValueError("expected a list")
    for number, group in enumerate(found):
        if not isinstance(group, dict) or not isinstance(group.get("id"), str):
            raise ValueError(f"entry {number} has no 'id'")
        for key in ("rows", *counts):
            value = group.get(key)
            if type(value) is not int or value < 0:
                raise ValueError(f"entry {number}: {key!r} is not a number of rows")
    return found
