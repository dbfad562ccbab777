"""Rows of .jsonl and .jsonl.gz files from outside, each checked to be a JSON object in UTF-8."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from scmini.errors import DataError, RecordError
from scmini.records import parse_row

Drop: TypeAlias = Callable[[str], None]
"""Told the reason for which a row is left out."""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each non-empty line.

    Lines end at a line feed only: other characters that Unicode calls line ends occur inside texts.

    Raises:
        DataError: the file cannot be read, or its compressed data breaks off; names file and line.
        RecordError: a line is not UTF-8, not JSON, or not an object.
    """
    for number, raw in _lines(path):
        if raw.strip():
            yield number, _row(path, number, raw)


def row_id(path: Path, number: int) -> str:
    """Id of a row that has none of its own: the file's name and the line."""
    return f"{path.name.split('.')[0]}-{number:06d}"


def text_field(path: Path, number: int, row: dict[str, Any], key: str) -> str:
    """A text of a row; `RecordError` where it is missing or something else."""
    if key not in row:
        raise RecordError(path, number, f"field {key!r} is missing")
    if not isinstance(row[key], str):
        raise RecordError(path, number, f"field {key!r}: expected text, got {row[key]!r:.80}")
    return str(row[key])


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            for number, raw in enumerate(handle, start=1):
                yield number, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the compressed data is damaged after line {number} ({error}); "
            "fetch or copy the file again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _row(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    row = parse_row(path, number, raw)
    if b"\\ud" in raw.lower() and _has_lone_surrogate(row):
        raise RecordError(path, number, "an escape \\ud... lacks its other half")
    return row


def _has_lone_surrogate(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
