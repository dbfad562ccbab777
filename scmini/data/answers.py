"""Reading what the filter needs of prompts and answers: one row, or one shard, at a time.

Token ids, by far the most of a shard, are left where they are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmini.errors import DataError, RecordError
from scmini.quoting import plain, quoted
from scmini.records import read_table


@dataclass(frozen=True)
class Answered:
    """A sampled prompt: the texts of its answers, and whether each came to its end."""

    id: str
    texts: list[str]
    finished: list[bool]
    failure: str | None
    """Why there are no answers, where that was recorded."""


def read_answers(path: Path) -> list[Answered]:
    """The rows of one shard samples/part-*.parquet.

    Raises:
        DataError: not such a file.
        RecordError: a row without id, or an answer without text.
    """
    import pyarrow as pa

    table = read_table(path)
    failures: list[str | None] = [None] * len(table)
    try:
        ids = table.column("id").to_pylist()
        lists = table.column("responses").combine_chunks()
        answers: Any = lists.flatten()
        texts = answers.field("text").to_pylist()
        ends = answers.field("finish_reason").to_pylist()
        sizes = lists.value_lengths().to_pylist()
        if "failure" in table.column_names:
            failures = table.column("failure").to_pylist()
    except (KeyError, AttributeError, ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: not a shard of answers ({plain(error, 200)}); delete its folder and sample "
            "again"
        ) from None
    found, start = [], 0
    for number, (id, size, failure) in enumerate(zip(ids, sizes, failures, strict=True), start=1):
        own = texts[start : start + (size or 0)]
        if not isinstance(id, str) or size is None or not all(isinstance(t, str) for t in own):
            raise RecordError(path, number, "an id or a text is missing")
        if not isinstance(failure, str | None):
            raise RecordError(path, number, f"failure is no text: {quoted(failure)}")
        finished = [reason == "stop" for reason in ends[start : start + size]]
        found.append(Answered(id, own, finished, failure))
        start += size
    return found
