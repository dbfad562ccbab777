"""Rows like data/train.jsonl: {"prompt": messages or text, "target", "rejected"?, "id"?}."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scmini.data.readers import Drop, read_rows, row_id, text_field
from scmini.errors import RecordError
from scmini.records import ROLES, Example, Message

EMPTY_PROMPT = "empty prompt"
EMPTY_TARGET = "empty target"
USELESS_REJECTED = "rejected answers that are empty or equal the target"


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
            if example.id in seen:
                raise RecordError(
                    path, number, f"id {example.id!r} was already used in {seen[example.id]}"
                )
            seen[example.id] = f"{path}, line {number}"
            if not example.prompt[-1]["content"].strip():
                drop(EMPTY_PROMPT)
            elif not example.target.strip():
                drop(EMPTY_TARGET)
            else:
                yield _with_useful_rejected(example, drop)


def _example(path: Path, number: int, row: dict[str, Any]) -> Example:
    id = text_field(path, number, row, "id") if "id" in row else row_id(path, number)
    rejected = row.get("rejected", [])
    if not isinstance(rejected, list) or not all(isinstance(text, str) for text in rejected):
        raise RecordError(
            path, number, f"field 'rejected': expected a list of texts, got {rejected!r:.80}"
        )
    target = text_field(path, number, row, "target")
    return Example(id, _prompt(path, number, row.get("prompt")), target, rejected)


def _prompt(path: Path, number: int, prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise RecordError(
            path, number, f"field 'prompt': expected text or a list of messages, got {prompt!r:.80}"
        )
    for message in prompt:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise RecordError(
                path,
                number,
                f"field 'prompt': expected {{'role': one of {', '.join(ROLES)}, 'content': text}}, "
                f"got {message!r:.80}",
            )
    if prompt[-1]["role"] != "user":
        raise RecordError(path, number, "field 'prompt': the last message must be the user's")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _with_useful_rejected(example: Example, drop: Drop) -> Example:
    target = example.target.strip()
    useful = [text for text in example.rejected if text.strip() and text.strip() != target]
    for _ in range(len(example.rejected) - len(useful)):
        drop(USELESS_REJECTED)
    return Example(example.id, example.prompt, example.target, useful)
