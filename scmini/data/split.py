"""Which rows train and which test, decided by the prompts' texts alone.

Two prompts are the same here if they differ in nothing but letter case and white space.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator

from scmini.data.readers import Drop
from scmini.errors import DataError
from scmini.records import Example, Message

LONG_PROMPT = "prompt longer than data.max_prompt_chars"
LONG_TARGET = "target longer than data.max_target_chars"
LEAKED = "prompt is already in the test split"


def within_limits(
    examples: Iterable[Example], max_prompt: int | None, max_target: int | None, drop: Drop
) -> Iterator[Example]:
    """The examples whose prompt (all its messages) and target have at most so many characters."""
    for example in examples:
        if max_prompt is not None and sum(len(m["content"]) for m in example.prompt) > max_prompt:
            drop(LONG_PROMPT, example)
        elif max_target is not None and len(example.target) > max_target:
            drop(LONG_TARGET, example)
        else:
            yield example


def prompt_digest(prompt: list[Message]) -> str:
    """sha256 of a prompt; space around a message does not count."""
    turns = [[message["role"], message["content"].strip()] for message in prompt]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def split(
    examples: Iterable[Example],
    num_test: int,
    drop: Drop,
    *,
    tests: Iterable[Example] | None = None,
    first_turn: bool = False,
) -> tuple[list[Example], list[Example]]:
    """(train, test), no prompt on both sides.

    Prompts are put in the order of their digests, which is as good as shuffled, so the first so
    many are a fair choice, and files that are sorted by subject or come one after another are
    mixed. The first `num_test` prompts (of `tests`, if given) are the test, one row each; further
    rows with such a prompt are dropped. The order of the input does not matter but for rows with
    one prompt.

    Args:
        tests: candidates of the test, if they come from elsewhere.
        first_turn: a dialogue is tested with its first question and first answer only, and all
            that begin with that question count as one prompt.

    Raises:
        DataError: no prompt would be left to train on, or there is none to test.
    """
    own = tests is None
    train = _groups(examples, first_turn)
    candidates = train if tests is None else _groups(tests, first_turn)
    if not train:
        raise DataError("the data has no usable prompt; what was left out, and why, stands above")
    if own and len(train) <= num_test:
        raise DataError(
            f"the data has {len(train)} usable prompts, and data.num_test: {num_test} leaves "
            "none to train on; lower it, or give more data"
        )
    chosen = list(candidates)[:num_test]
    tested = []
    for key in chosen:
        group = candidates[key]
        best = min(group, key=lambda e: len(e.prompt)) if first_turn else group[0]
        for example in [*group, *([] if own else train.get(key, []))]:
            if example is not best:
                drop(LEAKED, example)
        tested.append(_opening(best) if first_turn else best)
        train.pop(key, None)
    if not tested or not train:
        raise DataError(
            f"data.dataset_test_split gives {len(tested)} test prompts and leaves {len(train)} to "
            "train on; name other splits"
        )
    return [example for group in train.values() for example in group], tested


def _groups(examples: Iterable[Example], first_turn: bool) -> dict[str, list[Example]]:
    """Examples of one prompt together, in the order of the least digest of their prompts."""
    groups: dict[str, list[tuple[str, Example]]] = {}
    for example in examples:
        prompt = _opening(example).prompt if first_turn else example.prompt
        groups.setdefault(_normalised(prompt), []).append((prompt_digest(prompt), example))
    order = sorted(groups, key=lambda key: min(digest for digest, _ in groups[key]))
    return {key: [example for _, example in groups[key]] for key in order}


def _normalised(prompt: list[Message]) -> str:
    turns = [[turn["role"], " ".join(turn["content"].casefold().split())] for turn in prompt]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def _opening(example: Example) -> Example:
    """The example up to its first answer."""
    for number, turn in enumerate(example.prompt):
        if turn["role"] == "assistant":
            return Example(example.id, example.prompt[:number], turn["content"])
    return example
