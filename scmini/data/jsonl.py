"""Rows like data/train.jsonl: {"prompt": messages or text, "target", "rejected"?, "id"?}."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scmini.data.readers import (
    Drop,
    claim_id,
    message,
    read_rows,
    row_id,
    text_field,
    usable,
)
from scmini.errors import RecordError
from scmini.quoting import quoted
from scmini.records import Example, Message


def read_examples_jsonl(paths: Iterable[Path], drop: Drop) -> Iterator[Example]:
    """Examples of the files in order; `drop` is told the reason for every row left out.

    A prompt may be a text, which becomes one message of the user. Rows without `id` are named after
    file and line. Rejected answers that are blank or equal the target are left out one by one.

    Raises:
        DataError: a file cannot be read. RecordError: a row is malformed, or an id comes twice.
    """
    seen: dict[str, str] = {}
    for path in paths:
        for number, row in read_rows(path):
            example = _example(path, number, row)
            claim_id(seen, path, number, example.id)
            found = usable(example, drop)
            if found is not None:
                yield found


def _example(path: Path, number: int, row: dict[str, Any]) -> Example:
    id = text_field(path, number, row, "id") if "id" in row else row_id(path, number)
    rejected = row.get("rejected", [])
    if not isinstance(rejected, list) or not all(isinstance(text, str) for text in rejected):
        raise RecordError(
            path, number, f"field 'rejected': expected a list of texts, got {quoted(rejected)}"
        )
    if "target" not in row:
        raise RecordError(
            path, number, "field 'target' is missing; data.format: auto reads rows of other shapes"
        )
    target = text_field(path, number, row, "target")
    return Example(id, _prompt(path, number, row.get("prompt")), target, rejected)


def _prompt(path: Path, number: int, prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise RecordError(
            path,
            number,
            f"field 'prompt': expected text or a list of messages, got {quoted(prompt)}",
        )
    messages = [message(path, number, "prompt", value) for value in prompt]
    if messages[-1]["role"] != "user":
        raise RecordError(path, number, "field 'prompt': the last message must be the user's")
    return messages
