"""Raw HH-RLHF transcripts: {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}.

The transcript that both share becomes the prompt, the last answer of `chosen` the target, that of
`rejected` the rejected response. Among the published rows there are odd ones (transcripts glued
together, empty answers, markers in the middle of an answer); these are dropped, each for one named
reason out of `REASONS`.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from scmini.data.readers import Drop, Row, text_field
from scmini.records import Example, Message

_TURN = re.compile(r"\n\n(Human|Assistant):")
_STRAY = re.compile(r"\b(?:Human|Assistant)\s?:")
_ROLES = {"Human": "user", "Assistant": "assistant"}

NOT_HUMAN_FIRST = "does not start with Human"
NOT_ASSISTANT_LAST = "does not end with Assistant"
REPEATED_ROLE = "two turns of one role in a row"
EMPTY_TURN = "empty turn"
EMPTY_CHOSEN = "empty chosen"
EMPTY_REJECTED = "empty rejected"
STRAY_MARKER = "role marker inside an answer"
PROMPTS_DIFFER = "prompts of chosen and rejected differ"
SAME_ANSWERS = "chosen equals rejected"
BEGUN_ANSWER = "prompt ends in the middle of an answer"
REASONS = (
    NOT_HUMAN_FIRST,
    NOT_ASSISTANT_LAST,
    REPEATED_ROLE,
    EMPTY_TURN,
    EMPTY_CHOSEN,
    EMPTY_REJECTED,
    STRAY_MARKER,
    PROMPTS_DIFFER,
    SAME_ANSWERS,
    BEGUN_ANSWER,
)


class OddTranscript(ValueError):
    """A transcript that is no dialogue; the text is one of `REASONS`."""


def parse_transcript(text: str) -> list[Message]:
    """The turns of a transcript, in turn the person's and the assistant's, which comes last.

    Space around a turn's text is not part of it. The last answer may be empty, other turns not.

    Raises:
        OddTranscript: with one of `REASONS`.
    """
    before, *rest = _TURN.split(text)
    roles = [_ROLES[name] for name in rest[::2]]
    texts = [content.strip() for content in rest[1::2]]
    if before.strip() or roles[:1] != ["user"]:
        raise OddTranscript(NOT_HUMAN_FIRST)
    if any(role == following for role, following in pairwise(roles)):
        raise OddTranscript(REPEATED_ROLE)
    if roles[-1] != "assistant":
        raise OddTranscript(NOT_ASSISTANT_LAST)
    if not all(texts[:-1]):
        raise OddTranscript(EMPTY_TURN)
    if any(_STRAY.search(answer) for answer in texts[1::2]):
        raise OddTranscript(STRAY_MARKER)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def parse_row(id: str, chosen: str, rejected: str) -> Example:
    """One row as an example.

    Raises:
        OddTranscript: with one of `REASONS`.
    """
    good, bad = parse_transcript(chosen), parse_transcript(rejected)
    target, refused = good.pop()["content"], bad.pop()["content"]
    if good != bad:
        raise OddTranscript(PROMPTS_DIFFER)
    if not target:
        raise OddTranscript(EMPTY_CHOSEN)
    if not refused:
        raise OddTranscript(EMPTY_REJECTED)
    if target == refused:
        raise OddTranscript(SAME_ANSWERS)
    return Example(id, good, target, [refused])


def parse_open_transcript(text: str) -> list[Message]:
    """The turns of a prompt that is a transcript, up to the person's last one.

    It ends where the assistant's answer would begin, with or without its marker.

    Raises:
        OddTranscript: with one of `REASONS`.
    """
    markers = _TURN.findall(text)
    turns = parse_transcript(text if markers[-1:] == ["Assistant"] else f"{text}\n\nAssistant:")
    if turns.pop()["content"]:
        raise OddTranscript(BEGUN_ANSWER)
    return turns


def read_hh_rlhf(rows: Iterable[Row], drop: Drop) -> Iterator[Example]:
    """Examples of raw rows in order; `drop` is told the reason for every row left out.

    Raises:
        DataError: a file cannot be read. RecordError: a row has no `chosen` or `rejected` text.
    """
    for row in rows:
        chosen, rejected = (
            text_field(row.path, row.number, row.values, key) for key in ("chosen", "rejected")
        )
        try:
            yield parse_row(row.id, chosen, rejected)
        except OddTranscript as odd:
            drop(str(odd), row)
