"""Conversations given as lists of turns, and what makes one usable.

Turns are {"role", "content"} (TRL, UltraChat) or {"from", "value"} (ShareGPT).
"""

import re
from itertools import pairwise
from typing import Any

from scmini.data.hh_rlhf import (
    EMPTY_TURN,
    NOT_ASSISTANT_LAST,
    NOT_HUMAN_FIRST,
    REPEATED_ROLE,
    STRAY_MARKER,
    OddTranscript,
)
from scmini.data.readers import EMPTY_PROMPT
from scmini.records import Message

NOT_TEXT = "a field that should be text, or a list of turns, is not"
UNKNOWN_ROLE = "a turn of a role other than system, user and assistant"
LATE_SYSTEM = "system message after the beginning"
STRAY_REJECTED = "rejected answers with role markers inside"

_ROLES = {
    **{"system": "system", "user": "user", "human": "user", "prompter": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
}
_MARKER = re.compile(r"^[ \t]*(?:Human|Assistant)[ \t]?:", re.MULTILINE)


def has_marker(answer: str) -> bool:
    """Whether a line of an answer begins like a turn of a transcript: two were glued together."""
    return _MARKER.search(answer) is not None


def parse_turns(value: Any) -> list[Message]:
    """The turns of a list; `OddTranscript` if one of them is none."""
    if not isinstance(value, list):
        raise OddTranscript(NOT_TEXT)
    return [_turn(item) for item in value]


def _turn(value: Any) -> Message:
    if not isinstance(value, dict):
        raise OddTranscript(NOT_TEXT)
    role = value.get("role") if value.get("role") is not None else value.get("from")
    content = value.get("content") if value.get("content") is not None else value.get("value")
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise OddTranscript(UNKNOWN_ROLE)
    if not isinstance(content, str):
        raise OddTranscript(NOT_TEXT)
    return {"role": _ROLES[role.lower()], "content": content}


def prompt_and_answer(turns: list[Message]) -> tuple[list[Message], str]:
    """A whole conversation as prompt and last answer, which may be blank.

    A blank system message is left out.

    Raises:
        OddTranscript: the roles do not take turns, an earlier turn is blank, or an answer of the
            prompt has role markers inside.
    """
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        turns = turns[1:]
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    roles = [turn["role"] for turn in spoken]
    if roles in ([], ["assistant"]):
        raise OddTranscript(EMPTY_PROMPT)
    if "system" in roles:
        raise OddTranscript(LATE_SYSTEM)
    if roles[0] != "user":
        raise OddTranscript(NOT_HUMAN_FIRST)
    if any(role == following for role, following in pairwise(roles)):
        raise OddTranscript(REPEATED_ROLE)
    if roles[-1] != "assistant":
        raise OddTranscript(NOT_ASSISTANT_LAST)
    *prompt, answer = turns
    if not all(turn["content"].strip() for turn in prompt):
        raise OddTranscript(EMPTY_PROMPT if len(spoken) == 2 else EMPTY_TURN)
    if any(turn["role"] == "assistant" and has_marker(turn["content"]) for turn in prompt):
        raise OddTranscript(STRAY_MARKER)
    return prompt, answer["content"]
