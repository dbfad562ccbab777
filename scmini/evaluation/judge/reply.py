"""What a judge answered, in the words that count: text, log-probabilities, tokens, or why not."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

ANSWERED, CUT, EMPTY, REFUSED = "answered", "cut at max_tokens", "empty answer", "refused"
NOT_JSON, NO_CHOICES = "not JSON", "an answer without choices"
TIMED_OUT, CONNECTION_LOST = "timed out", "connection lost"
TOO_MANY, SERVER_ERROR = "too many requests", "server error"
TOO_LONG = "too long for the judge"
PAID = (ANSWERED, CUT, EMPTY, REFUSED)
"""Outcomes for which the judge worked: these are kept and not asked for again."""
LOST = (NOT_JSON, NO_CHOICES, TIMED_OUT, CONNECTION_LOST, TOO_MANY, SERVER_ERROR)
"""Outcomes that say something of the server, nothing of the question."""


@dataclass(frozen=True)
class Reply:
    """Outcome of one request.

    Attributes:
        outcome: `ANSWERED`, or why that is no answer.
        text: what the judge said; of an outcome without answer the reason, if one is known.
        top: natural log-probabilities of the likeliest first tokens, if the server told them.
        tokens: (of the prompt, of the answer), if the server told them.
        wait: seconds after which the server wants to be asked again.
    """

    outcome: str
    text: str = ""
    top: dict[str, float] | None = None
    tokens: tuple[int, int] | None = None
    wait: float | None = None

    @property
    def paid(self) -> bool:
        return self.outcome in PAID


def read_reply(text: str) -> Reply:
    """The body of a successful `/chat/completions`; it may hold anything."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return Reply(NOT_JSON, text.strip()[:200])
    choices = data.get("choices") if isinstance(data, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return Reply(NO_CHOICES, text.strip()[:200])
    said, refusal = _content(message.get("content")), message.get("refusal")
    top, tokens = _top_logprobs(choice.get("logprobs")), _tokens(data.get("usage"))
    finish = choice.get("finish_reason")
    if finish == "content_filter" or (isinstance(refusal, str) and refusal.strip()):
        return Reply(REFUSED, said or _content(refusal), top, tokens)
    if finish == "length":
        return Reply(CUT, said, top, tokens)
    return Reply(ANSWERED if said.strip() else EMPTY, said, top, tokens)


def to_json(reply: Reply) -> dict[str, Any]:
    """What a cache keeps of a paid reply."""
    kept: dict[str, Any] = {"outcome": reply.outcome, "text": reply.text}
    if reply.top is not None:
        kept["top_logprobs"] = reply.top
    if reply.tokens is not None:
        kept["tokens"] = list(reply.tokens)
    return kept


def from_json(row: Any) -> Reply:
    """The inverse of `to_json`; `ValueError` for anything else."""
    if not isinstance(row, dict) or row.get("outcome") not in PAID:
        raise ValueError("no outcome")
    if not isinstance(row.get("text"), str):
        raise ValueError("no text")
    top = row.get("top_logprobs")
    if top is not None:
        top = {str(token): float(value) for token, value in dict(top).items()}
    tokens = row.get("tokens")
    if tokens is not None:
        tokens = (int(tokens[0]), int(tokens[1]))
    return Reply(row["outcome"], row["text"], top, tokens)


def as_number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _content(content: Any) -> str:
    """Text of a message: one text, or a list of parts."""
    if isinstance(content, str):
        text = content
    else:
        parts = content if isinstance(content, list) else []
        texts = (part.get("text") for part in parts if isinstance(part, dict))
        text = "".join(part for part in texts if isinstance(part, str))
    # Half of an emoji, which a badly cut answer may end in, could not be written to a file.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _top_logprobs(logprobs: Any) -> dict[str, float] | None:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    top = first.get("top_logprobs") if isinstance(first, dict) else None
    if not isinstance(top, list):
        return None
    found: dict[str, float] = {}
    for entry in top:
        token = entry.get("token") if isinstance(entry, dict) else None
        value = as_number(entry.get("logprob")) if isinstance(token, str) else None
        if value is not None:
            found.setdefault(_content(token), value)
    return found or None


def _tokens(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    counts = as_number(usage.get("prompt_tokens")), as_number(usage.get("completion_tokens"))
    if counts[0] is None or counts[1] is None:
        return None
    return int(counts[0]), int(counts[1])
