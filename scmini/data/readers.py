"""Rows of files from outside: JSON lines, JSON, Parquet; each an object of readable texts.

And what all formats have in common: which files are read, and what an example must have.
"""

import gzip
import json
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from scmini.errors import DataError, RecordError
from scmini.json_lines import LONE_SURROGATE, has_lone_surrogate, lines_of, parse_row
from scmini.quoting import plain, quoted
from scmini.records import ROLES, Example, Message
from scmini.sections import DataConfig


class Row(NamedTuple):
    """A row from outside, of a file or of one split of a data set."""

    path: Path
    """The file; for a data set of the hub its name and split, written like one."""
    number: int
    """Line or row, from 1."""
    values: dict[str, Any]

    @property
    def id(self) -> str:
        return row_id(self.path, self.number)


Drop: TypeAlias = Callable[[str, Row | Example], None]
"""Told the reason for which a row, or an answer of it, is left out, and the row or its example."""

EMPTY_PROMPT = "empty prompt"
EMPTY_TARGET = "empty target"
USELESS_REJECTED = "rejected answers that are empty or equal the target"

MOST_OF_ARRAY = 1 << 30
"""Bytes of a JSON array, which is read as a whole."""
_BATCH_ROWS, _BATCH_BYTES = 1024, 1 << 31
"""Rows of a Parquet file read at a time, and the most that they may take if every row of a row
group were as large as its largest possible one."""
_ROWS = (".jsonl", ".jsonl.gz", ".parquet")
_LFS_POINTER = b"version https://git-lfs.github.com"
_DUMP = "[print(json.dumps(row, default=lambda a: a.tolist())) for row in rows]"
_PICKLES = {
    ".pkl": "import json, pickle, sys; rows = pickle.load(open(sys.argv[1], 'rb')); " + _DUMP,
    ".npy": "import json, numpy, sys; "
    "rows = numpy.load(sys.argv[1], allow_pickle=True).tolist(); " + _DUMP,
}
"""Kinds of files that run code when they are read, and a program that turns one into JSON lines."""


def data_files(data: DataConfig) -> list[Path]:
    """The files that `data.path` names; none for the demo.

    A folder stands for the .jsonl, .jsonl.gz and .parquet files in it, by name.

    Raises:
        DataError: a folder without such files, a pickle, or what is no file (a pipe, a device).
    """
    named = [data.path] if isinstance(data.path, str) else data.path or []
    found = [file for path in named for file in _files_in(Path(path))]
    for path in found:
        _refuse_endless(path)
        if path.suffix.lower() in (".pickle", *_PICKLES):
            raise DataError(_refusal(path))
    return found


def _files_in(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            return [path]
        files = sorted(inner for inner in path.iterdir() if inner.is_file())
    except OSError as error:
        raise DataError(f"data.path: {path}: {error.strerror}; name another") from None
    found = [file for file in files if file.name.endswith(_ROWS) and file.name[0] != "."]
    if not found and (pickles := [file for file in files if file.suffix in _PICKLES]):
        return pickles
    if not found:
        raise DataError(
            f"data.path: the folder {path} holds no .jsonl file and no .parquet file; name one "
            "that does"
        )
    return found


def _refusal(path: Path) -> str:
    program = _PICKLES[".npy" if path.suffix.lower() == ".npy" else ".pkl"]
    return (
        f"data.path: {path}: reading a pickle runs whatever code is in it, so scmini does not. If "
        "you trust the file, turn it into JSON lines yourself and name these instead:\n"
        f'python -c "{program}" {shlex.quote(str(path))} > '
        f"{shlex.quote(str(path.with_suffix('.jsonl')))}"
    )


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, object) for each non-empty line, or each row of a Parquet file.

    Lines end at a line feed only: other characters that Unicode calls line ends occur inside texts.
    A .json or .json.gz file may also be one array of objects, which is held in memory.

    Raises:
        DataError: the file cannot be read, or its data breaks off; names file and line.
        RecordError: a line is not UTF-8, not JSON, or not an object.
    """
    _refuse_endless(path)
    _refuse_pointer(path)
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.name.endswith((".json", ".json.gz")) and _is_array(path):
        yield from _array_rows(path)
    else:
        for number, raw in _lines(path):
            if raw.strip():
                yield number, parse_row(path, number, raw)


def file_rows(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of several files in order; raises what `read_rows` raises."""
    for path in paths:
        for number, values in read_rows(path):
            yield Row(path, number, values)


def row_id(path: Path, number: int) -> str:
    """Id of a row that has none of its own: the file's name and the line."""
    return f"{path.name.split('.')[0]}-{number:06d}"


def text_field(path: Path, number: int, row: dict[str, Any], key: str) -> str:
    """A text of a row; `RecordError` where it is missing or something else."""
    if key not in row:
        raise RecordError(path, number, f"field {key!r} is missing")
    if not isinstance(row[key], str):
        raise RecordError(path, number, f"field {key!r}: expected text, got {quoted(row[key])}")
    return str(row[key])


def message(path: Path, number: int, key: str, value: Any) -> Message:
    """One message of the list in field `key`; `RecordError` where it is none."""
    if (
        not isinstance(value, dict)
        or value.get("role") not in ROLES
        or not isinstance(value.get("content"), str)
    ):
        raise RecordError(
            path,
            number,
            f"field {key!r}: expected {{'role': one of {', '.join(ROLES)}, 'content': text}}, "
            f"got {quoted(value)}",
        )
    return {"role": value["role"], "content": value["content"]}


def usable(example: Example, drop: Drop) -> Example | None:
    """The example with those of its rejected answers that one can learn from.

    None, `drop` being told the reason, if prompt or target are blank. Rejected answers that are
    blank or equal the target are left out one by one.
    """
    if not example.prompt or not example.prompt[-1]["content"].strip():
        drop(EMPTY_PROMPT, example)
        return None
    target = example.target.strip()
    if not target:
        drop(EMPTY_TARGET, example)
        return None
    useful = [text for text in example.rejected if text.strip() and text.strip() != target]
    for _ in range(len(example.rejected) - len(useful)):
        drop(USELESS_REJECTED, example)
    return Example(example.id, example.prompt, example.target, useful)


def claim_id(seen: dict[str, str], path: Path, number: int, id: str) -> None:
    """Put down where an id is used; `RecordError` if it was used before."""
    if id in seen:
        raise RecordError(path, number, f"id {quoted(id)} was already used in {seen[id]}")
    seen[id] = f"{path}, line {number}"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            for number, raw in lines_of(path, handle):
                yield number, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the compressed data is damaged after line {number} ({error}); "
            "fetch or copy the file again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _refuse_endless(path: Path) -> None:
    """What is there but no file may never end, or wait for somebody to write."""
    try:
        odd = path.exists() and not path.is_file()
    except OSError:  # reading will tell
        return
    if odd:
        what = "a folder" if path.is_dir() else "no ordinary file (a pipe or device)"
        raise DataError(f"data.path: {path} is {what}; name a file of rows")


def _refuse_pointer(path: Path) -> None:
    try:
        with open(path, "rb") as handle:
            begin = handle.read(len(_LFS_POINTER))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if begin == _LFS_POINTER:
        raise DataError(
            f"{path}: this is a pointer of git-lfs, not the data; run `git lfs pull` in its folder"
        )


def _is_array(path: Path) -> bool:
    for _, raw in _lines(path):
        if raw.strip():
            return raw.lstrip().startswith(b"[")
    return False


def _array_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    content = bytearray()
    for _, raw in _lines(path):
        content += raw
        if len(content) > MOST_OF_ARRAY:
            raise DataError(
                f"{path}: an array of more than {MOST_OF_ARRAY >> 30} GiB, which would have to be "
                "held in memory; write one object per line (.jsonl) instead"
            )
    try:
        rows = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecordError(path, line, f"not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise RecordError(path, error.lineno, f"not JSON ({error.msg})") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({plain(error, 80)})") from None
    escapes = b"\\ud" in content.lower()
    del content
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            problem = f"expected an array of objects, got {type(row).__name__}"
            raise RecordError(path, number, problem)
        if escapes and has_lone_surrogate(row):
            raise RecordError(path, number, LONE_SURROGATE)
        yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_batch_rows(file.metadata)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError, pa.ArrowException) as error:
        first = plain(str(error).partition("\n")[0], 200)
        raise DataError(
            f"{path}: not a readable Parquet file after row {number} ({first}); "
            "fetch or copy it again"
        ) from None


def _batch_rows(metadata: Any) -> int:
    """Rows to read at a time.

    A value is stored at least once in its row group, so no row is larger than all of the group; but
    every row may repeat the same large value, which is then written out for each.
    """
    groups = (metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
    largest = max(groups, default=0)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))
