"""Which rows train and which test, decided by the prompts' texts alone."""

import hashlib
import json
from collections.abc import Iterable

from scmini.data.readers import Drop
from scmini.errors import DataError
from scmini.records import Example, Message

LONG_PROMPT = "prompt longer than data.max_prompt_chars"
LONG_TARGET = "target longer than data.max_target_chars"
LEAKED = "prompt is already in the test split"


def within_limits(
    examples: Iterable[Example], max_prompt: int | None, max_target: int | None, drop: Drop
) -> list[Example]:
    """The examples whose prompt (all its messages) and target have at most so many characters."""
    found = []
    for example in examples:
        if max_prompt is not None and sum(len(m["content"]) for m in example.prompt) > max_prompt:
            drop(LONG_PROMPT)
        elif max_target is not None and len(example.target) > max_target:
            drop(LONG_TARGET)
        else:
            found.append(example)
    return found


def prompt_digest(prompt: list[Message]) -> str:
    """sha256 of a prompt; space around a message does not count."""
    turns = [[message["role"], message["content"].strip()] for message in prompt]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def split(
    examples: list[Example], num_test: int, drop: Drop
) -> tuple[list[Example], list[Example]]:
    """(train, test), no prompt on both sides.

    Examples are put in the order of their prompts' digests, which is as good as shuffled, so the
    first so many are a fair choice, and files that are sorted by subject or come one after another
    are mixed. The first `num_test` prompts are the test, one row each; further rows with such a
    prompt are dropped. The order of the input does not matter but for rows with one prompt.

    Raises:
        DataError: no prompt would be left to train on.
    """
    by_prompt: dict[str, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(prompt_digest(example.prompt), []).append(example)
    if len(by_prompt) <= num_test:
        raise DataError(
            f"the data has {len(by_prompt)} usable prompts, and data.num_test: {num_test} leaves "
            "none to train on; lower it, or give more data"
        )
    groups = [by_prompt[key] for key in sorted(by_prompt)]
    for group in groups[:num_test]:
        for _ in group[1:]:
            drop(LEAKED)
    train = [example for group in groups[num_test:] for example in group]
    return train, [group[0] for group in groups[:num_test]]
