"""Files of the original Self-Contrast project, of every stage of it, as it wrote them.

Rows are told apart by their fields, whatever the file is called:

    SFT rows         instruction, history, system, `output` a text: the target
    pair rows        the same, `output` [chosen, rejected, ...]; k of them in a row for a prompt
    response rows    `outputs`, the answers of the SFT model (a list, or a text if there is one)
    embeddings rows  response rows with similarities, which are not read (they are computed here)

A prompt is `messages` (UltraChat; the last one, the answer, is not read), or `instruction` after
`history` (HH-RLHF, pairs), or a transcript in `prompt` (Nectar). The target is `target`, else
`output` or its first element, else the first of Nectar's `answers`.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from scmini.data.hh_rlhf import (
    NOT_ASSISTANT_LAST,
    REPEATED_ROLE,
    OddTranscript,
    parse_transcript,
)
from scmini.data.readers import (
    Drop,
    Row,
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

BROKEN_TRANSCRIPT = "target or last answer with role markers"
BROKEN_UP = "answers of one character each (one answer broken up, as the original does for n = 1)"

Answered: TypeAlias = Callable[[str, list[str]], None]
"""Told an example's id and the answers that came with it."""


@dataclass
class _Row:
    id: str
    number: int
    named: bool
    """Whether the id is the row's own."""
    prompt: list[Message]
    target: str
    rejected: list[str] = field(default_factory=list)
    answers: list[str] | None = None


def read_self_contrast(paths: Iterable[Path], drop: Drop, answered: Answered) -> Iterator[Example]:
    """Examples of the files in order; `drop` is told the reason for every row left out.

    Pair rows that follow one another with one prompt and one chosen answer become one example with
    all their rejected answers. Rows without `id` are named after file and line. `answered` is told
    the answers of every example from a response row, [] where none is of use.

    Raises:
        DataError: a file cannot be read. RecordError: a row is none of the project's, a field is
            of another kind, or an id comes twice.
    """
    seen: dict[str, str] = {}
    for path in paths:
        for row in _merged(_rows(path, drop)):
            if row.named:
                claim_id(seen, path, row.number, row.id)
            example = usable(Example(row.id, row.prompt, row.target, row.rejected), drop)
            if example is None:
                continue
            if row.answers is not None:
                answered(row.id, row.answers)
            yield example


class AnswerFile:
    """Answers by id, on disk: a data set has more than fits in memory.

    Args:
        folder: where there is room; the file has no name there and goes with the process.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._starts: dict[str, int] = {}

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, id: str, answers: list[str]) -> None:
        """Put down the answers of an example."""
        if answers:
            self._starts[id] = self._file.seek(0, 2)
            self._file.write(json.dumps(answers).encode() + b"\n")

    def of(self, id: str) -> list[str]:
        """The answers of an example; [] if it has none."""
        if id not in self._starts:
            return []
        self._file.seek(self._starts[id])
        return list(json.loads(self._file.readline()))


def _rows(path: Path, drop: Drop) -> Iterator[_Row]:
    for number, row in read_rows(path):
        target, rejected = _target(path, number, row)
        try:
            prompt = _prompt(path, number, row, target)
        except OddTranscript as odd:
            drop(str(odd), Row(path, number, row))
            continue
        id = _own_id(path, number, row)
        yield _Row(
            id=row_id(path, number) if id is None else id,
            number=number,
            named=id is not None,
            prompt=prompt,
            target=target,
            rejected=rejected,
            answers=_answers(path, number, row, drop),
        )


def _merged(rows: Iterator[_Row]) -> Iterator[_Row]:
    """The rows, neighbouring pair rows of one prompt and one chosen answer made one."""
    held: _Row | None = None
    for row in rows:
        if held is None:
            held = row
        elif _is_pair(held) and _is_pair(row) and _same(held, row):
            held.rejected += row.rejected
        else:
            yield held
            held = row
    if held is not None:
        yield held


def _is_pair(row: _Row) -> bool:
    return bool(row.rejected) and row.answers is None


def _same(one: _Row, other: _Row) -> bool:
    return one.prompt == other.prompt and one.target == other.target


def _own_id(path: Path, number: int, row: dict[str, Any]) -> str | None:
    """The row's id, which may be an integer; None if it has none."""
    id = row.get("id")
    if id is None or isinstance(id, str):
        return id
    if isinstance(id, int) and not isinstance(id, bool) and id.bit_length() < 4096:
        return str(id)
    raise RecordError(path, number, f"field 'id': expected text or an integer, got {quoted(id)}")


def _target(path: Path, number: int, row: dict[str, Any]) -> tuple[str, list[str]]:
    """Target and rejected answers; "" for a target that is there but empty."""
    output = row.get("output")
    rejected: list[str] = []
    if isinstance(output, list):
        texts = _texts(path, number, "output", output)
        output, rejected = "".join(texts[:1]), texts[1:]
    if row.get("target") is not None:
        return text_field(path, number, row, "target"), rejected
    if output is not None:
        return text_field(path, number, {"output": output}, "output"), rejected
    answers = row.get("answers")
    if isinstance(answers, list) and answers and isinstance(answers[0], dict):
        return text_field(path, number, answers[0], "answer"), rejected
    raise RecordError(
        path,
        number,
        "no target: a row of the original project has a field 'target' or 'output', or a list "
        "'answers'; for rows of your own use data.format: jsonl",
    )


def _prompt(path: Path, number: int, row: dict[str, Any], target: str) -> list[Message]:
    """The conversation up to the target; `OddTranscript` says why there is none."""
    if "messages" in row:
        return _before_answer(path, number, row["messages"])
    if "instruction" in row:
        return _after_history(path, number, row)
    if "prompt" not in row:
        raise RecordError(
            path,
            number,
            "no prompt: a row of the original project has a field 'messages', 'instruction' or "
            "'prompt'; for rows of your own use data.format: jsonl",
        )
    turns = parse_transcript(text_field(path, number, row, "prompt") + target)
    if turns.pop()["content"] != target.strip():
        raise OddTranscript(BROKEN_TRANSCRIPT)
    return turns


def _before_answer(path: Path, number: int, messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise RecordError(
            path, number, f"field 'messages': expected a list of messages, got {quoted(messages)}"
        )
    turns = [message(path, number, "messages", value) for value in messages]
    if not turns or turns.pop()["role"] != "assistant":
        raise OddTranscript(NOT_ASSISTANT_LAST)
    if turns and turns[-1]["role"] != "user":
        raise OddTranscript(REPEATED_ROLE)
    return turns


def _after_history(path: Path, number: int, row: dict[str, Any]) -> list[Message]:
    """System message, earlier turns, and `instruction` with `input` on the line below it."""
    texts = {
        key: text_field(path, number, row, key) if row.get(key) is not None else ""
        for key in ("system", "instruction", "input")
    }
    turns = [_turn("system", texts["system"])] if texts["system"] else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RecordError(path, number, f"field 'history': expected a list, got {quoted(history)}")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(
                path, number, f"field 'history': expected [user, assistant], got {quoted(pair)}"
            )
        asked, answered = _texts(path, number, "history", pair)
        turns += [_turn("user", asked), _turn("assistant", answered)]
    asked = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    return [*turns, _turn("user", asked)]


def _answers(path: Path, number: int, row: dict[str, Any], drop: Drop) -> list[str] | None:
    """The answers of a response row; None for other rows.

    For n = 1 the original wrote the answer's characters as a list. They are put together again
    where one of them is a space, which no answer of its own can be (leading spaces were stripped);
    elsewhere nobody can tell them from short answers.
    """
    outputs = row.get("outputs")
    if outputs is None:
        return None
    answers = _texts(path, number, "outputs", [outputs] if isinstance(outputs, str) else outputs)
    if len(answers) < 2 or any(len(answer) != 1 for answer in answers):
        return answers
    if " " in answers:
        return ["".join(answers)]
    drop(BROKEN_UP, Row(path, number, row))
    return []


def _texts(path: Path, number: int, key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RecordError(
            path, number, f"field {key!r}: expected a list of texts, got {quoted(value)}"
        )
    return value


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}
