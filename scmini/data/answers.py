"""Reading what the filter needs of prompts and answers: one row, or one shard, at a time.

Token ids, by far the most of a shard, are left where they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmini.errors import DataError, RecordError
from scmini.records import Example, read_jsonl, read_table


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
    table = read_table(path)
    try:
        ids = table.column("id").to_pylist()
        lists = table.column("responses").combine_chunks()
        answers: Any = lists.flatten()
        texts = answers.field("text").to_pylist()
        ends = answers.field("finish_reason").to_pylist()
        sizes = lists.value_lengths().to_pylist()
    except (KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: not a shard of answers ({error}); delete its folder and sample again"
        ) from None
    failures = [None] * len(ids)
    if "failure" in table.column_names:
        failures = table.column("failure").to_pylist()
    found, start = [], 0
    for number, (id, size, failure) in enumerate(zip(ids, sizes, failures, strict=True), start=1):
        if id is None or size is None or None in texts[start : start + size]:
            raise RecordError(path, number, "an id or a text is missing")
        finished = [reason == "stop" for reason in ends[start : start + size]]
        found.append(Answered(id, texts[start : start + size], finished, failure))
        start += size
    return found


def stream_examples(path: Path) -> Iterator[Example]:
    """Rows of data/train.jsonl, one in memory at a time.

    Raises:
        RecordError: a field is missing or of another kind.
    """
    for number, row in read_jsonl(path):
        kinds = {"id": str, "prompt": list, "target": str, "rejected": list}
        values = {"rejected": [], **row}
        for key, kind in kinds.items():
            if not isinstance(values.get(key), kind):
                raise RecordError(path, number, f"field {key!r} is missing or no {kind.__name__}")
        yield Example(**{key: values[key] for key in kinds})
