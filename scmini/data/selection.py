"""Which of a prompt's answers may become negatives, and which of these are drawn.

Similarities are cosines to the target. The modes other than `default` have the candidate sets of
the original project: its answers had lost their leading spaces before anything else, so texts are
compared without them there; its ranks count from 0 (least similar) and equal values share the
lowest rank.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

from scmini.seeding import rng

BLANK = "blank"
TRUNCATED = "truncated"
TARGET = "equal to the target"
DUPLICATE = "duplicate"
SIMILAR = "too similar to the target"


@dataclass(frozen=True)
class Answers:
    """A prompt's target and its answers in the order in which they were drawn."""

    target: str
    texts: list[str]
    finished: list[bool]
    """Whether the answer came to its end (finish_reason "stop")."""
    similarity: list[float]


@dataclass
class Candidates:
    """Indices of the answers that may become negatives, ascending, and why the others may not."""

    kept: list[int]
    dropped: Counter[str] = field(default_factory=Counter)


def candidates(answers: Answers, mode: str, keep_fraction: float, k: int) -> Candidates:
    """The candidates under `filter.mode`.

    Args:
        mode: "default", "all", "alldedup", "last-P" or "lastdedup-P" (P: decimals of a share).
        keep_fraction: of the unique answers, the least similar share that stays ("default" only).
        k: negatives wanted; "last-P" makes room for as many.
    """
    if mode == "default":
        found = unfiltered(answers)
        return _least_similar(answers, found, keep_fraction)
    name, _, digits = mode.partition("-")
    share = float(f"0.{digits or 0}")
    texts = [text.lstrip(" ") for text in answers.texts]
    found = Candidates(list(range(len(texts))))
    if name.endswith("dedup"):
        found = _first_of_each(found, texts)
    if name == "last":
        found = _last(answers, found, share, k)
    elif name == "lastdedup":
        found = _lastdedup(answers, found, share)
    return _keep(found, [index for index in found.kept if texts[index]], BLANK)


def usable(answers: Answers) -> Candidates:
    """Answers that could be trained on at all: not blank, come to their end, not the target."""
    found = Candidates([])
    target = answers.target.strip()
    for index, text in enumerate(answers.texts):
        if not text.strip():
            found.dropped[BLANK] += 1
        elif not answers.finished[index]:
            found.dropped[TRUNCATED] += 1
        elif text.strip() == target:
            found.dropped[TARGET] += 1
        else:
            found.kept.append(index)
    return found


def unfiltered(answers: Answers) -> Candidates:
    """Usable answers, each text (without the space around it) once."""
    return _first_of_each(usable(answers), [text.strip() for text in answers.texts])


def draw(kept: list[int], k: int, seed: int, id: str, n: int) -> list[int]:
    """k candidates in random order (all, if there are fewer).

    Every one of the n answers gets a random number from (seed, id), and candidates come in the
    order of theirs. So the draw of k is the beginning of that of 2k, and a candidate's turn does
    not depend on which others there are.
    """
    numbers = rng(seed, "negatives", id)
    turn = [numbers.random() for _ in range(n)]
    return sorted(kept, key=lambda index: turn[index])[:k]


def min_ranks(values: list[float]) -> list[int]:
    """For each value how many are smaller: equal values share the lowest rank."""
    first: dict[float, int] = {}
    for place, value in enumerate(sorted(values)):
        first.setdefault(value, place)
    return [first[value] for value in values]


def _keep(found: Candidates, kept: list[int], reason: str) -> Candidates:
    dropped = found.dropped.copy()
    if len(kept) < len(found.kept):
        dropped[reason] += len(found.kept) - len(kept)
    return Candidates(kept, dropped)


def _first_of_each(found: Candidates, texts: list[str]) -> Candidates:
    first: dict[str, int] = {}
    for index in found.kept:
        first.setdefault(texts[index], index)
    return _keep(found, list(first.values()), DUPLICATE)


def _least_similar(answers: Answers, found: Candidates, share: float) -> Candidates:
    """The least similar share, rounded up; of equal ones the earlier."""
    number = math.ceil(share * len(found.kept) - 1e-9)  # 0.55 * 100 is a little over 55
    ordered = sorted(found.kept, key=lambda index: (answers.similarity[index], index))
    return _keep(found, sorted(ordered[:number]), SIMILAR)


def _last(answers: Answers, found: Candidates, share: float, k: int) -> Candidates:
    """Ranks below that of the least similar share, or below k."""
    if not found.kept:
        return found
    ranks = min_ranks(answers.similarity)
    bound = max(sorted(ranks)[int(len(ranks) * share)], k)
    return _keep(found, [index for index in found.kept if ranks[index] < bound], SIMILAR)


def _lastdedup(answers: Answers, found: Candidates, share: float) -> Candidates:
    """As `_last` without k, over unique answers, but with ranks and share among all answers."""
    if not found.kept:
        return found
    ranks = min_ranks(answers.similarity)
    place = min(int(len(ranks) * share), len(found.kept) - 1)
    bound = sorted(ranks[index] for index in found.kept)[place]
    return _keep(found, [index for index in found.kept if ranks[index] < bound], SIMILAR)
