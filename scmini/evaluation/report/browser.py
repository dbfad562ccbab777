"""What the page's browser of prompts leafs through: rows of data, as many as a page can carry.

A run may have thousands of prompts with tens of answers each. Prompts are taken in an order of
which any beginning is spread evenly over the file, until a budget of bytes is used up; among test
prompts every fourth is one where a method does much better or worse than the target. The page says
how many of each there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from scmini.config import num_negatives, spin_iterations
from scmini.data.selection import REASONS
from scmini.evaluation.report.page import conversation, visible
from scmini.evaluation.report.training_prompts import Answer, TrainingPrompt, of_every_reason
from scmini.evaluation.report.wording import Unit
from scmini.records import Generation, Reward

TEST_BYTES, TRAINING_BYTES = 3_000_000, 1_500_000
"""Budgets of the two browsers, in bytes of JSON."""
MOST_TRAINING_PROMPTS = 200
"""Their answers are looked up in the shards of samples/, which takes a while for each shard."""
TEST_CHARS, TRAINING_CHARS = 4000, 1500
"""Longer texts are cut, saying so."""
MOST_TAKEN, MOST_DROPPED, MOST_SPARED = 16, 6, 3
"""Answers to a training prompt: negatives of each method, dropped ones, and the other ones."""
EVENLY_BEFORE_EXTREME = 3
_CANDIDATE, _ELSEWHERE = -1, -2
"""Instead of a reason: the filter lets the answer pass; it is none of the sampled answers."""


def spread(count: int) -> Iterator[int]:
    """0 to count - 1 in van der Corput's order: any beginning of it is spread evenly."""
    bits = max(count - 1, 0).bit_length()
    for number in range(1 << bits):
        place = int(f"{number:0{bits}b}"[::-1], 2) if bits else 0
        if place < count:
            yield place


def extremes(differences: Sequence[Sequence[float]]) -> Iterator[int]:
    """Positions of the largest and smallest differences, of one sequence after the other in turn.

    Positions come again where they are extreme in several sequences.
    """
    orders = [sorted(range(len(row)), key=row.__getitem__) for row in differences]
    for rank in range(max(map(len, orders), default=0)):
        for order in orders:
            yield from (order[-1 - rank], order[rank])


def answer_rows(
    generations: Mapping[str, Sequence[Generation]],
    rewards: Mapping[str, Sequence[Reward]],
    unit: Unit,
    main: str,
    *,
    budget: int = TEST_BYTES,
) -> dict[str, Any]:
    """Test prompts with the target and each method's answer.

    Args:
        rewards: by method, in the order of the answers; empty where nobody graded.
        main: the method that the page is about.

    Returns:
        What browser.js.j2 reads. `rows` are in the order of the file; `texts` and `rewards` of a
        row have the order of `methods`, of which `main` is the first; `columns` are indices into it
        in the order of the run.
    """
    given = list(generations)
    methods = sorted(given, key=lambda method: method != main)
    total = len(generations[main])

    def row(position: int) -> dict[str, Any]:
        first = generations[main][position]
        texts = [visible(generations[m][position].response, TEST_CHARS) for m in methods]
        made: dict[str, Any] = {
            "id": visible(first.id, 200),
            "prompt": visible(conversation(first.prompt), TEST_CHARS),
            "target": visible(first.target, TEST_CHARS),
            "texts": texts,
        }
        if rewards:
            made["goal"] = rewards[main][position].target_reward
            made["rewards"] = [rewards[m][position].reward for m in methods]
        return made

    differences = [[r.reward - r.target_reward for r in rewards[m]] for m in methods if rewards]
    rows, extreme = _within(budget, row, spread(total), extremes(differences))
    return {
        "methods": methods,
        "columns": [methods.index(name) for name in given],
        "graded": bool(rewards),
        "scale": unit.scale,
        "digits": unit.digits,
        "total": total,
        "extreme": extreme,
        "rows": rows,
    }


def training_rows(
    prompts: Sequence[TrainingPrompt],
    order: Sequence[str],
    total: int,
    *,
    budget: int = TRAINING_BYTES,
) -> dict[str, Any]:
    """Training prompts with the answers that became negatives, and some of those that did not.

    Args:
        order: ids in the order in which they are taken until the budget is used up.
        total: how many prompts the first method is trained on.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    methods = list(dict.fromkeys(method for prompt in prompts for method in prompt.taken))
    wanted = [prompt.id for prompt in prompts]
    positions = iter([wanted.index(id) for id in order if id in by_id])
    rows, _ = _within(budget, lambda i: _training_row(prompts[i]), positions, iter(()))
    return {
        "methods": methods,
        "filtered": [is_filtered(method) for method in methods],
        "reasons": list(REASONS),
        "total": total,
        "rows": rows,
    }


def is_filtered(method: str) -> bool:
    """Whether the method's negatives are candidates under the section `filter`."""
    k = num_negatives(method)
    return k is not None and not spin_iterations(method) and not method.endswith("-unfiltered")


def _training_row(prompt: TrainingPrompt) -> dict[str, Any]:
    """Answers are (text, similarity or null, index into REASONS, `_CANDIDATE` or `_ELSEWHERE`)."""
    taken = {method: indices[:MOST_TAKEN] for method, indices in prompt.taken.items()}
    chosen = list(dict.fromkeys(chain.from_iterable(taken.values())))
    ours = set(chosen)
    others = [a for i, a in enumerate(prompt.answers[: prompt.num_answers]) if i not in ours]
    spared = [answer for answer in others if answer.reason is None]
    answers = [_answer(prompt.answers[i], sampled=i < prompt.num_answers) for i in chosen]
    answers += [_answer(answer) for answer in of_every_reason(others)[:MOST_DROPPED]]
    answers += [_answer(answer) for answer in spared[:MOST_SPARED]]
    return {
        "id": visible(prompt.id, 200),
        "prompt": visible(conversation(prompt.prompt), TRAINING_CHARS),
        "target": visible(prompt.target, TRAINING_CHARS),
        "answers": answers,
        "taken": {m: [chosen.index(i) for i in indices] for m, indices in taken.items()},
        "count": {method: len(indices) for method, indices in prompt.taken.items()},
        "candidates": prompt.num_candidates,
        "sampled": prompt.num_answers,
    }


def _answer(answer: Answer, *, sampled: bool = True) -> tuple[str, float | None, int]:
    similarity = None if answer.similarity is None else round(answer.similarity, 4)
    kind = _CANDIDATE if sampled else _ELSEWHERE
    if answer.reason is not None:
        kind = REASONS.index(answer.reason)
    return visible(answer.text, TRAINING_CHARS), similarity, kind


def _within(
    budget: int,
    row: Callable[[int], dict[str, Any]],
    evenly: Iterable[int],
    extreme: Iterable[int],
) -> tuple[list[dict[str, Any]], int]:
    """Rows within a budget of bytes, at least one, in the order of their positions.

    Returns:
        The rows, and how many of them come from `extreme`.
    """
    found: dict[int, dict[str, Any]] = {}
    num_extreme = 0
    fresh = (position for position in evenly if position not in found)
    odd = (position for position in extreme if position not in found)
    for position, is_extreme in _mixed(fresh, odd):
        made = row(position)
        budget -= len(island(made).encode()) + 1
        if found and budget < 0:
            break
        found[position] = made
        num_extreme += is_extreme
    return [found[position] for position in sorted(found)], num_extreme


def _mixed(evenly: Iterator[int], extreme: Iterator[int]) -> Iterator[tuple[int, bool]]:
    """Some of one, then one of the other, with whether it is one of the other."""
    while some := [*islice(evenly, EVENLY_BEFORE_EXTREME)]:
        yield from ((position, False) for position in some)
        yield from ((position, True) for position in islice(extreme, 1))


def island(value: Any) -> str:
    """JSON that can stand inside a <script> element: none of its characters ends one.

    `<`, `>`, `&` and the line separators of JavaScript become escapes, which mean the same.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def training_order(ids: Sequence[str]) -> list[str]:
    """The ids to look up, in the order in which they are to be shown if they fit."""
    return [ids[position] for position in islice(spread(len(ids)), MOST_TRAINING_PROMPTS)]
