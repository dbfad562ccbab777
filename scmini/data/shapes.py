"""Rows in the usual shapes, told apart by their columns.

    a conversation   `messages` or `conversations`: the last answer is the target
    an answer        `prompt` with `target` or `completion` (text, or turns, as TRL has them)
    a preference     `prompt`, `chosen`, `rejected`; without `prompt` it is what both begin with
    Alpaca           `instruction`, `input`, `system`, `history` with `output` (or a preference)

A conversation is a list of {"role", "content"} or {"from", "value"}. A text that starts like a
transcript ("\\n\\nHuman: ") is read as one. `rejected` may be one answer or a list of them.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scmini.data.dialogues import (
    NOT_TEXT,
    STRAY_REJECTED,
    has_marker,
    parse_turns,
    prompt_and_answer,
)
from scmini.data.hh_rlhf import (
    EMPTY_CHOSEN,
    EMPTY_REJECTED,
    PROMPTS_DIFFER,
    SAME_ANSWERS,
    STRAY_MARKER,
    OddTranscript,
    parse_open_transcript,
    parse_transcript,
)
from scmini.data.readers import EMPTY_PROMPT, EMPTY_TARGET, Drop, Row, usable
from scmini.errors import RecordError
from scmini.records import Example, Message
from scmini.sections import ColumnsConfig

UNKNOWN_SHAPE = "row of no known shape"
BAD_COMPLETION = "completion that is marked as bad (label: false)"

_CONVERSATIONS = ("messages", "conversations")
_PROMPTS = ("instruction", "prompt", *_CONVERSATIONS)
"""Where the turns before an answer are, the first of them that a row has."""
_ANSWERS = ("target", "chosen", "completion", "output")
_HUMAN = "\n\nHuman:"


def read_shapes(
    rows: Iterable[Row], columns: ColumnsConfig, drop: Drop, taken: set[str]
) -> Iterator[Example]:
    """Examples of the rows in order; `drop` is told the reason for every row left out.

    Args:
        columns: names of the columns where they are other ones.
        taken: ids in use; those of the examples are added. A row's own `id` becomes the example's
            where it is text or an integer that no other has, else file and line do.

    Raises:
        DataError: the data cannot be read.
        RecordError: the first row of a file is of no known shape, or lacks a column that `columns`
            names.
    """
    names = {key: name for key, name in columns.model_dump().items() if name is not None}
    begun: set[Path] = set()
    for row in rows:
        if row.path not in begun:
            begun.add(row.path)
            _check_first(row, names)
        values = _renamed(row.values, names)
        try:
            prompt, target, rejected = _parts(values)
        except OddTranscript as odd:
            drop(str(odd), row)
            continue
        id = _own_id(values.get("id"))
        id = row.id if id is None or id in taken else id
        kept = [text for text in rejected if not has_marker(text)]
        for _ in range(len(rejected) - len(kept)):
            drop(STRAY_REJECTED, row)
        example = usable(Example(id, prompt, target, kept), drop)
        if example is not None:
            taken.add(id)
            yield example


def _check_first(row: Row, names: Mapping[str, str]) -> None:
    for key, name in names.items():
        if name not in row.values:
            raise RecordError(
                row.path,
                row.number,
                f"data.columns.{key}: there is no column {name!r}; {_columns_of(row)}",
            )
    if not _has_shape(_renamed(row.values, names)):
        raise RecordError(
            row.path,
            row.number,
            f"{_columns_of(row)}, which is no known shape (docs/data.md lists them); say which "
            "column is what with data.columns, such as {prompt: question, target: answer}",
        )


def _columns_of(row: Row) -> str:
    names = ", ".join(json.dumps(key)[:40] for key in list(row.values)[:20])
    return f"its columns are {names}" if names else "it has no columns"


def _has_shape(values: Mapping[str, Any]) -> bool:
    return (
        any(key in values for key in _CONVERSATIONS)
        or ("chosen" in values and "rejected" in values)
        or (any(key in values for key in _PROMPTS) and any(key in values for key in _ANSWERS))
    )


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The row with the names that are known here; columns that are named push similar ones aside.

    Columns that are null are left out: Parquet has every column in every row.
    """
    aside = set(names.values())
    if {"prompt", "messages"} & set(names):
        aside.update(_PROMPTS)
    if "target" in names:
        aside.update(_ANSWERS)
    found = {key: value for key, value in values.items() if key not in aside}
    found |= {key: values.get(name) for key, name in names.items()}
    return {key: value for key, value in found.items() if value is not None}


def _own_id(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    try:
        return str(value)
    except ValueError:  # more digits than Python writes
        return None


def _parts(values: Mapping[str, Any]) -> tuple[list[Message], str, list[str]]:
    """Prompt, target and rejected answers of a row; `OddTranscript` says why there are none."""
    key = next((key for key in _ANSWERS if key in values), None)
    if key is None:
        return *_conversation(values), []
    if not _has_shape(values):
        raise OddTranscript(UNKNOWN_SHAPE)
    if key == "completion" and values.get("label") is False:
        raise OddTranscript(BAD_COMPLETION)
    first, *others = _answers(values[key]) or [""]
    if others and key != "output":
        raise OddTranscript(NOT_TEXT)
    others += _answers(values.get("rejected"))
    before = _before(values)
    if before is None and not all(_is_whole(answer) for answer in (first, *others)):
        before, first, others = _common_beginning(first, others)
    prompt, target = prompt_and_answer(_whole(before, first))
    if has_marker(target):
        raise OddTranscript(STRAY_MARKER)
    if not target.strip():
        raise OddTranscript(EMPTY_CHOSEN if key == "chosen" else EMPTY_TARGET)
    rejected = []
    for other in others:
        other_prompt, text = prompt_and_answer(_whole(before, other))
        if other_prompt != prompt:
            raise OddTranscript(PROMPTS_DIFFER)
        rejected.append(text)
    if key == "chosen" and len(rejected) == 1:
        if not rejected[0].strip():
            raise OddTranscript(EMPTY_REJECTED)
        if rejected[0].strip() == target.strip():
            raise OddTranscript(SAME_ANSWERS)
    return prompt, target, rejected


def _conversation(values: Mapping[str, Any]) -> tuple[list[Message], str]:
    key = next((key for key in _CONVERSATIONS if key in values), None)
    if key is None:
        raise OddTranscript(UNKNOWN_SHAPE)
    prompt, target = prompt_and_answer(_with_system(values, parse_turns(values[key])))
    if has_marker(target):
        raise OddTranscript(STRAY_MARKER)
    return prompt, target


def _answers(value: Any) -> list[str | list[Message]]:
    """The answers of a column: each a text or turns. An empty list of turns is no answer."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [parse_turns([value])]
    if not isinstance(value, list):
        raise OddTranscript(NOT_TEXT)
    if all(isinstance(item, dict) for item in value):
        return [parse_turns(value)] if value else []
    found = [item if isinstance(item, str) else parse_turns(item) for item in value]
    if [] in found:
        raise OddTranscript(NOT_TEXT)
    return found


def _before(values: Mapping[str, Any]) -> list[Message] | None:
    """The turns up to an answer; None if the row has none of its own."""
    key = next((key for key in _PROMPTS if key in values), None)
    if key is None:
        return None
    value = values[key]
    if not isinstance(value, str):
        return _with_system(values, parse_turns(value))
    if value.startswith(_HUMAN):
        return _with_system(values, parse_open_transcript(value))
    below = _text(values, "input")
    asked = "\n".join(text for text in (value, below) if text)
    turns = [*_history(values), {"role": "user", "content": asked}]
    return _with_system(values, turns)


def _with_system(values: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    system = _text(values, "system")
    if not system or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _history(values: Mapping[str, Any]) -> list[Message]:
    history = values.get("history", [])
    if not isinstance(history, list):
        raise OddTranscript(NOT_TEXT)
    turns: list[Message] = []
    for pair in history:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise OddTranscript(NOT_TEXT)
        asked, told = pair
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return turns


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise OddTranscript(NOT_TEXT)
    return value


def _is_whole(answer: str | list[Message]) -> bool:
    """Whether an answer brings its prompt along: a transcript, or turns that begin with others."""
    if isinstance(answer, str):
        return answer.startswith(_HUMAN)
    return answer[0]["role"] != "assistant"


def _whole(before: list[Message] | None, answer: str | list[Message]) -> list[Message]:
    """A prompt with an answer as one conversation.

    Of the space around a text, the one that parts it from a prompt in front of it is no part of it.
    """
    if _is_whole(answer):
        return parse_transcript(answer) if isinstance(answer, str) else answer
    turns = before or []
    if isinstance(answer, str):
        return [*turns, {"role": "assistant", "content": answer.removeprefix(" ")}]
    return [*turns, *answer]


def _common_beginning(
    first: str | list[Message], others: list[str | list[Message]]
) -> tuple[list[Message], str | list[Message], list[str | list[Message]]]:
    """The prompt that plain texts share, cut after a space, and what each has behind it."""
    texts = [answer for answer in (first, *others) if isinstance(answer, str)]
    if len(texts) < 1 + len(others):
        raise OddTranscript(PROMPTS_DIFFER)
    same = os.path.commonprefix(texts)  # noqa: RUF071 (texts, not paths)
    end = next((n for n in range(len(same), 0, -1) if same[n - 1].isspace()), 0)
    shared = texts[0][:end].strip()
    if not shared:
        raise OddTranscript(EMPTY_PROMPT)
    prompt = [{"role": "user", "content": shared}]
    return prompt, texts[0][end:], [text[end:] for text in texts[1:]]
