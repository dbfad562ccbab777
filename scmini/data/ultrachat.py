"""Rows of UltraChat (HuggingFaceH4/ultrachat_200k): {"prompt", "prompt_id", "messages"}.

As in the original project, the target is the last answer of `messages` and the prompt is all that
came before it. (It tests with first questions only: `data.test_prompts: first-turn`.)
"""

from collections.abc import Iterable, Iterator

from scmini.data.dialogues import has_marker, parse_turns, prompt_and_answer
from scmini.data.hh_rlhf import STRAY_MARKER, OddTranscript
from scmini.data.readers import Drop, Row, usable
from scmini.errors import RecordError
from scmini.records import Example


def read_ultrachat(rows: Iterable[Row], drop: Drop) -> Iterator[Example]:
    """Examples of the rows in order; `drop` is told the reason for every row left out.

    Raises:
        DataError: the data cannot be read.
        RecordError: a row has no field `messages`.
    """
    for row in rows:
        if "messages" not in row.values:
            raise RecordError(
                row.path,
                row.number,
                "field 'messages' is missing; every row of UltraChat has it (rows of another "
                "shape: data.format: auto)",
            )
        try:
            prompt, target = prompt_and_answer(parse_turns(row.values["messages"]))
            if has_marker(target):
                raise OddTranscript(STRAY_MARKER)
        except OddTranscript as odd:
            drop(str(odd), row)
            continue
        example = usable(Example(row.id, prompt, target), drop)
        if example is not None:
            yield example
