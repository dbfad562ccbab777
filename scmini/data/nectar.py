"""Rows of Nectar (berkeley-nest/Nectar): a transcript and seven ranked answers.

    {"prompt": "\\n\\nHuman: ...\\n\\nAssistant: ", "answers": [{"answer", "model", "rank"}, ...]}

The target is the answer of the lowest rank number, 1; those of higher numbers are the rejected
answers, the best of them first. Prompts of several turns are kept whole.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from scmini.data.dialogues import NOT_TEXT, STRAY_REJECTED, has_marker
from scmini.data.hh_rlhf import STRAY_MARKER, OddTranscript, parse_open_transcript
from scmini.data.readers import Drop, Row, usable
from scmini.errors import RecordError
from scmini.records import Example

UNRANKED = "answers without text or rank"


def read_nectar(rows: Iterable[Row], drop: Drop) -> Iterator[Example]:
    """Examples of the rows in order; `drop` is told the reason for every row left out.

    Answers are stripped. Rejected answers that are blank, equal the target or have role markers
    inside are left out one by one.

    Raises:
        DataError: the data cannot be read.
        RecordError: a row has no field `prompt` or `answers`.
    """
    for row in rows:
        for key in ("prompt", "answers"):
            if key not in row.values:
                raise RecordError(
                    row.path,
                    row.number,
                    f"field {key!r} is missing; a row of Nectar has prompt and answers (rows of "
                    "another shape: data.format: auto)",
                )
        try:
            example = usable(_example(row, drop), drop)
        except OddTranscript as odd:
            drop(str(odd), row)
            continue
        if example is not None:
            yield example


def _example(row: Row, drop: Drop) -> Example:
    prompt, answers = row.values["prompt"], row.values["answers"]
    if not isinstance(prompt, str) or not isinstance(answers, list):
        raise OddTranscript(NOT_TEXT)
    turns = parse_open_transcript(prompt)
    ranked = sorted((_ranked(answer) for answer in answers), key=lambda pair: pair[0])
    if not ranked:
        raise OddTranscript(UNRANKED)
    best, target = ranked[0]
    if has_marker(target):
        raise OddTranscript(STRAY_MARKER)
    rejected = []
    for rank, text in ranked:
        if rank > best and has_marker(text):
            drop(STRAY_REJECTED, row)
        elif rank > best:
            rejected.append(text)
    return Example(row.id, turns, target, rejected)


def _ranked(answer: Any) -> tuple[float, str]:
    rank, text = (
        (answer.get("rank"), answer.get("answer")) if isinstance(answer, dict) else (None, None)
    )
    if (
        not isinstance(rank, int | float)
        or isinstance(rank, bool)
        or not -math.inf < rank < math.inf
    ):
        raise OddTranscript(UNRANKED)
    if not isinstance(text, str):
        raise OddTranscript(UNRANKED)
    return rank, text.strip()
