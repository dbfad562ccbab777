"""Lines of JSON that anybody may have written, each read as one row or refused with its place."""

import codecs
import json
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from scmini.errors import RecordError
from scmini.quoting import plain

LONGEST_LINE = 1 << 28
"""Bytes of a line that are read as one row; a longer one is no row, but eats all memory."""


def lines_of(path: Path, handle: BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of an open file; `RecordError` for one that is far too long."""
    number = 0
    while raw := handle.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            raise RecordError(
                path, number, f"a line of more than {LONGEST_LINE >> 20} MiB; leave it out"
            )
        yield number, raw


def parse_row(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        RecordError: it is not UTF-8, not JSON or not an object, or a text in it cannot be written.
    """
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(path, number, f"not UTF-8 ({error.reason}){_remedy(raw)}") from None
    except json.JSONDecodeError as error:
        raise RecordError(path, number, f"not JSON ({error.msg}){_remedy(raw)}") from None
    except (RecursionError, ValueError) as error:
        raise RecordError(path, number, f"not readable JSON ({plain(error, 80)})") from None
    if not isinstance(row, dict):
        raise RecordError(path, number, f"expected an object, got {type(row).__name__}")
    if b"\\ud" in raw.lower() and has_lone_surrogate(row):
        raise RecordError(path, number, LONE_SURROGATE)
    return row


LONE_SURROGATE = "an escape \\ud... lacks its other half"


def has_lone_surrogate(row: dict[str, Any]) -> bool:
    """Whether a text of the row is none that UTF-8 could write."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    except RecursionError:  # Python reads deeper JSON than it writes
        return True
    return False


def _remedy(raw: bytes) -> str:
    """What to do with a file of another encoding, known by what stands at its beginning."""
    if raw.startswith(codecs.BOM_UTF8):
        return "; save the file as UTF-8 without a byte-order mark"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or raw[1:2] == b"\0":
        return "; it looks like UTF-16: save the file as UTF-8 (iconv -f UTF-16 -t UTF-8)"
    return ""
