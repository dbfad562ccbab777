"""The rows that stages hand to one another, and how they are read and written.

Every format is one JSON object per line (UTF-8) or a Parquet table. Readers check each row and
raise `RecordError` with file, line and field. Unknown fields are ignored: a stage reads what it
names.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scmini.errors import DataError, RecordError
from scmini.json_lines import lines_of, parse_row
from scmini.quoting import plain, quoted

Message = dict[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """A prompt with its target and, where the data set has labels, its rejected responses."""

    id: str
    prompt: list[Message]
    target: str
    rejected: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Response:
    """One sampled answer: exactly the ids the sampler produced, with the end token if it came."""

    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Samples:
    """All answers that the model gave to one prompt."""

    id: str
    prompt_token_ids: list[int]
    responses: list[Response]
    failure: str | None = None
    """Why there are none."""


@dataclass(frozen=True)
class Pair:
    """One training example of DPO: the target as chosen, k responses as rejected.

    `response_index` points into the samples of the prompt; -2 - j means the data set's own j-th
    rejected response (-1 is the target itself, used in reference/logps.parquet).
    """

    id: str
    prompt: list[Message]
    chosen: str
    rejected: list[str]
    similarity: list[float]
    response_index: list[int]


@dataclass(frozen=True)
class Generation:
    """A method's answer to a test prompt."""

    id: str
    prompt: list[Message]
    response: str
    target: str


@dataclass(frozen=True)
class Reward:
    """Rewards of a method's answer and of the target."""

    id: str
    reward: float
    target_reward: float


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each non-empty line; else `RecordError`."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: no ordinary file; name a file of JSON lines")
    try:
        handle = open(path, "rb")  # noqa: SIM115 (closed by the with below)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    with handle:
        for number, raw in lines_of(path, handle):
            if raw.strip():
                yield number, parse_row(path, number, raw)


def write_jsonl(path: Path, rows: Iterable[Any]) -> int:
    """Write dataclasses or dicts, all or nothing; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.with_name(f".{path.name}.tmp")
    count = 0
    with open(torn, "w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            value = row if isinstance(row, dict) else asdict(row)
            handle.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(torn, path)
    return count


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"field {key!r} is missing")
    if not isinstance(row[key], str):
        raise ValueError(f"field {key!r}: expected text, got {type(row[key]).__name__}")
    return row[key]


def _list(row: dict[str, Any], key: str, kinds: type | tuple[type, ...]) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list) or not all(
        isinstance(item, kinds) and not isinstance(item, bool) for item in value
    ):
        names = (
            kinds.__name__ if isinstance(kinds, type) else " or ".join(k.__name__ for k in kinds)
        )
        raise ValueError(f"field {key!r}: expected a list of {names}, got {quoted(value)}")
    return value


def _messages(row: dict[str, Any]) -> list[Message]:
    messages = _list(row, "prompt", dict)
    if not messages:
        raise ValueError("field 'prompt' has no message")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f"field 'prompt': expected {{'role': one of {', '.join(ROLES)}, 'content': text}}, "
                f"got {quoted(message)}"
            )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _example(row: dict[str, Any]) -> Example:
    rejected = _list(row, "rejected", str) if "rejected" in row else []
    return Example(_text(row, "id"), _messages(row), _text(row, "target"), rejected)


def _pair(row: dict[str, Any]) -> Pair:
    pair = Pair(
        _text(row, "id"),
        _messages(row),
        _text(row, "chosen"),
        _list(row, "rejected", str),
        [_finite("similarity", x) for x in _list(row, "similarity", (int, float))],
        _list(row, "response_index", int),
    )
    if not pair.rejected:
        raise ValueError("field 'rejected' is empty: a pair needs at least one negative")
    if not len(pair.rejected) == len(pair.response_index) == len(pair.similarity):
        raise ValueError("fields 'rejected', 'similarity', 'response_index' differ in length")
    return pair


def _generation(row: dict[str, Any]) -> Generation:
    return Generation(
        _text(row, "id"), _messages(row), _text(row, "response"), _text(row, "target")
    )


def _reward(row: dict[str, Any]) -> Reward:
    for key in ("reward", "target_reward"):
        if not isinstance(row.get(key), (int, float)) or isinstance(row[key], bool):
            raise ValueError(f"field {key!r}: expected a number, got {quoted(row.get(key))}")
    reward, target = (_finite(key, row[key]) for key in ("reward", "target_reward"))
    return Reward(_text(row, "id"), reward, target)


def _finite(key: str, value: float) -> float:
    """JSON as Python reads it knows NaN, Infinity, and whole numbers of any size."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"field {key!r}: expected a finite number, got {quoted(value)}")
    return number


def _read(path: Path, parse: Callable[[dict[str, Any]], Any]) -> list[Any]:
    found: list[Any] = []
    seen: dict[str, int] = {}
    for number, row in read_jsonl(path):
        try:
            record = parse(row)
        except ValueError as error:
            raise RecordError(path, number, str(error)) from None
        if record.id in seen:
            raise RecordError(
                path, number, f"id {quoted(record.id)} was already used in line {seen[record.id]}"
            )
        seen[record.id] = number
        found.append(record)
    return found


def read_examples(path: Path) -> list[Example]:
    """Rows of data/train.jsonl and data/test.jsonl."""
    return _read(path, _example)


def stream_examples(path: Path) -> Iterator[Example]:
    """The same, one in memory at a time; ids are not compared."""
    for number, row in read_jsonl(path):
        try:
            yield _example(row)
        except ValueError as error:
            raise RecordError(path, number, str(error)) from None


def read_pairs(path: Path) -> list[Pair]:
    """Rows of pairs/<method>.jsonl."""
    return _read(path, _pair)


def read_generations(path: Path) -> list[Generation]:
    """Rows of generations/<method>.jsonl."""
    return _read(path, _generation)


def read_rewards(path: Path) -> list[Reward]:
    """Rows of rewards/<method>.jsonl."""
    return _read(path, _reward)


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Like `write_jsonl`, leaving `rejected` out where the data set has none."""
    rows = (asdict(example) for example in examples)
    return write_jsonl(
        path, ({k: v for k, v in row.items() if k != "rejected" or v} for row in rows)
    )


_SAMPLES_COLUMNS = ("id", "prompt_token_ids", "responses")


def write_samples(path: Path, rows: list[Samples]) -> None:
    """One shard samples/part-*.parquet, all or nothing."""
    import pyarrow as pa

    response = pa.struct(
        [("text", pa.string()), ("token_ids", pa.list_(pa.int32())), ("finish_reason", pa.string())]
    )
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("responses", pa.list_(response)),
            ("failure", pa.string()),
        ]
    )
    write_table(path, pa.Table.from_pylist([asdict(row) for row in rows], schema=schema))


def write_table(path: Path, table: Any) -> None:
    """Write a pyarrow Table as Parquet, all or nothing."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, torn)
    with open(torn, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(torn, path)


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """A Parquet file, or some columns of it, as a pyarrow Table.

    Raises:
        DataError: it is torn, no such file, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: column {missing[0]!r} is missing")
            return file.read(columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({plain(error, 200)})") from None


def read_samples(folder: Path) -> Iterator[Samples]:
    """All shards of a samples folder in order, one shard in memory at a time."""
    for path in sorted(folder.glob("part-*.parquet")):
        yield from read_samples_shard(path)


def read_samples_shard(path: Path) -> list[Samples]:
    """The rows of one shard.

    Raises:
        DataError: not such a file.
        RecordError: a row without id, or with responses that are none.
    """
    import pyarrow as pa

    table = read_table(path)
    missing = [name for name in _SAMPLES_COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"{path}: column {missing[0]!r} is missing")
    try:
        rows = table.to_pylist()
    except (ValueError, pa.ArrowException) as error:  # text that is no UTF-8, times out of range
        raise DataError(f"{path}: not readable ({plain(error, 200)})") from None
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(_samples(row))
        except ValueError as error:
            raise RecordError(path, number, str(error)) from None
    return found


def _samples(row: dict[str, Any]) -> Samples:
    """`ValueError` for a row that is none."""
    try:
        responses = [Response(**response) for response in row["responses"]]
    except TypeError as error:
        raise ValueError(f"column 'responses': {plain(error)}") from None
    if not isinstance(row["id"], str) or any(not isinstance(r.text, str) for r in responses):
        raise ValueError("an id or a text is missing")
    for reason in (row.get("failure"), *(r.finish_reason for r in responses)):
        if not isinstance(reason, str | None):
            raise ValueError(f"a reason that is no text: {quoted(reason)}")
    for ids in (row["prompt_token_ids"], *(r.token_ids for r in responses)):
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError("token ids are missing, or no whole numbers")
    return Samples(row["id"], row["prompt_token_ids"], responses, row.get("failure"))
