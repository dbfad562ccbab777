"""Which answers may become negatives: against the original project's rules, restated plainly."""

import zlib
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from data_helpers import needs_shared, shared_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from scmini.data import selection
from scmini.data.selection import Answers, candidates, min_ranks, shuffled, unfiltered, usable
from scmini.data.similarity import group_similarity
from scmini.sections import FilterConfig

MODES = [
    "all",
    "alldedup",
    "last-75",
    "last-5",
    "last-05",
    "last-0",
    "last-100",
    "lastdedup-75",
    "lastdedup-125",
    "lastdedup-25",
    "lastdedup-100",
]


def rule(mode: str = "default", **options: Any) -> FilterConfig:
    return FilterConfig.model_validate({"mode": mode, **options})


def original(mode: str, outputs: list[str], similarities: list[float], k: int) -> list[str]:
    """The texts that the original project may draw from (facts of its construct_synthetic_data).

    `outputs` as its sampler stores them: without leading spaces. Its encoder sees just these, so
    equal ones have equal similarities. Ranks are stored before, by a quadratic rule: how many are
    strictly smaller.
    """
    n = len(outputs)
    ranks = [sum(other < value for other in similarities) for value in similarities]
    if mode == "all":
        kept = outputs
    elif mode == "alldedup":
        kept = []
        for output in outputs:
            if output not in kept:
                kept.append(output)
    elif mode.startswith("lastdedup-"):
        share = float("0." + mode.split("-")[1])
        unique: list[str] = []
        unique_ranks: list[int] = []
        for output, rank in zip(outputs, ranks, strict=True):
            if output not in unique:
                unique.append(output)
                unique_ranks.append(rank)
        if not unique:
            return []
        m = min(int(n * share), len(unique) - 1)
        t = sorted(unique_ranks)[m]
        kept = [output for output, rank in zip(unique, unique_ranks, strict=True) if rank < t]
    else:
        share = float("0." + mode.split("-")[1])
        if not n:
            return []
        t = max(sorted(ranks)[int(n * share)], k)
        kept = [output for output, rank in zip(outputs, ranks, strict=True) if rank < t]
    return [output for output in kept if output.lstrip(" ")]


def default_rule(answers: Answers, options: FilterConfig) -> list[str | None]:
    """DESIGN 5.6 and the options around it, one answer after another, in exact numbers."""
    why: list[str | None] = [None] * len(answers.texts)
    target = answers.target.strip()
    for index, text in enumerate(answers.texts):
        earlier = [answers.texts[i].strip() for i in range(index) if why[i] is None]
        if text.strip() == "":
            why[index] = "blank"
        elif not answers.finished[index]:
            why[index] = "truncated"
        elif text.strip() == target:
            why[index] = "equal to the target"
        elif text.strip() in earlier:
            why[index] = "duplicate"
    for index, text in enumerate(answers.texts):
        length, value = Fraction(len(text.strip())), answers.similarity[index]
        limits: dict[str, tuple[float | None, Any]] = {
            "too short": (options.min_length_ratio, lambda x, n=length: n < exact(x) * len(target)),
            "too long": (options.max_length_ratio, lambda x, n=length: n > exact(x) * len(target)),
            "below min_similarity": (options.min_similarity, lambda x, v=value: v < x),
            "above max_similarity": (options.max_similarity, lambda x, v=value: v > x),
        }
        for reason, (limit, is_outside) in limits.items():
            if why[index] is None and limit is not None and is_outside(limit):
                why[index] = reason
    if options.near_duplicate_similarity is not None:
        least, kept = exact(options.near_duplicate_similarity), []
        for index in [i for i, reason in enumerate(why) if reason is None]:
            if any(are_alike(answers.vectors, index, other, least) for other in kept):
                why[index] = "near-duplicate"
            else:
                kept.append(index)
    remaining = [i for i, reason in enumerate(why) if reason is None]
    surplus = len(remaining) - number_kept(options.keep_fraction, len(remaining))
    for _ in range(surplus):
        most = max(remaining, key=lambda index: (answers.similarity[index], index))
        remaining.remove(most)
        why[most] = "too similar to the target"
    return why


def exact(value: float) -> Fraction:
    """What a person wrote into the file."""
    return Fraction(repr(value))


def number_kept(share: float, count: int) -> int:
    number = 0
    while number < exact(share) * count:
        number += 1
    return number


def are_alike(vectors: Any, i: int, j: int, least: Fraction) -> bool:
    """cos(i, j) >= least, for vectors of whole numbers, without a root."""
    a, b = ([int(x) for x in vectors[k]] for k in (i, j))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot > 0 and dot * dot >= least**2 * sum(x * x for x in a) * sum(x * x for x in b)


def check_original(answers: Answers, k: int) -> None:
    stored = [text.lstrip(" ") for text in answers.texts]
    values = [answers.similarity[stored.index(text)] for text in stored]
    for mode in MODES:
        found = candidates(answers, rule(mode), k)
        assert [stored[i] for i in found.kept] == original(mode, stored, values, k), mode
        assert found.kept == [i for i, reason in enumerate(found.reasons) if reason is None]
        assert len(found.kept) + found.dropped.total() == len(stored)


def check_default(answers: Answers, options: FilterConfig) -> None:
    expected = default_rule(answers, options)
    found = candidates(answers, options, 1)
    assert found.reasons == expected
    assert found.dropped == Counter(reason for reason in expected if reason)
    # the other rules have none of the options
    assert unfiltered(answers).reasons == default_rule(answers, rule(keep_fraction=1.0))
    repeated = [None if reason == "duplicate" else reason for reason in unfiltered(answers).reasons]
    assert usable(answers).reasons == repeated


pieces = ["", " ", "\n", "\u3000", "a", " a", "a ", "  a", "b", "cc", "d d", "eee\n", "t t", " t t"]
texts = st.lists(st.sampled_from([*pieces, "x" * 7]), max_size=14)


@st.composite
def any_answers(draw: Any) -> Answers:
    answers = draw(texts)
    size = len(answers)
    few = st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9])  # so that ties are common
    values = draw(st.lists(few, min_size=size, max_size=size))
    finished = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    numbers = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    vectors = np.array([draw(numbers) for _ in answers], np.float16).reshape(size, 3)
    return Answers("\tt t\n", answers, finished, values, vectors)


@st.composite
def any_options(draw: Any) -> FilterConfig:
    options = {
        "keep_fraction": st.sampled_from([0.1, 0.3, 0.5, 0.55, 0.75, 1.0]),
        "min_similarity": st.sampled_from([-1.0, 0.1, 0.15]),
        "max_similarity": st.sampled_from([0.2, 0.5, 1.0]),
        "near_duplicate_similarity": st.sampled_from([0.01, 0.5, 0.8, 1.0]),
        "min_length_ratio": st.sampled_from([0.3, 1 / 3, 0.6]),
        "max_length_ratio": st.sampled_from([1.0, 1.1, 2.0]),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(options))))
    return rule(**{name: draw(options[name]) for name in chosen})


@settings(max_examples=300, deadline=None)
@given(answers=any_answers(), k=st.integers(1, 16))
def test_candidates_are_those_of_the_original(answers: Answers, k: int) -> None:
    check_original(answers, k)


@settings(max_examples=400, deadline=None)
@given(answers=any_answers(), options=any_options())
def test_candidates_are_those_of_the_default_rule(answers: Answers, options: FilterConfig) -> None:
    check_default(answers, options)


def embedded(texts: list[str]) -> Any:
    """Word counts, hashed into 512 places, float16."""
    vectors = np.zeros((len(texts), 512), np.float16)
    for vector, text in zip(vectors, texts, strict=True):
        for word in text.split():
            vector[zlib.crc32(word.encode()) % 512] += 1
        vector /= max(float(np.linalg.norm(vector.astype(np.float64))), 1e-3)
    return vectors


@needs_shared
@pytest.mark.parametrize(
    "name", ["self_instruct_user_responses", "humaneval_codegen16b_n100", "arena_hard_responses"]
)
def test_candidates_on_real_answers(name: str) -> None:
    rows = shared_rows(f"{name}.jsonl.gz")
    for row in rows:
        # HumanEval's samples have no target: the most frequent one is taken for it
        target = row.get("target") or Counter(row["outputs"]).most_common(1)[0][0]
        vectors = embedded([target, *row["outputs"]])
        values = group_similarity([len(vectors)], vectors)[0]
        by_text: dict[str, float] = {}
        for text, value in zip(row["outputs"], values, strict=True):
            assert by_text.setdefault(text, value) == value  # ties of ranks rest on this
        finished = [len(output) < 1000 for output in row["outputs"]]
        answers = Answers(target, row["outputs"], finished, values)
        for k in (1, 16):
            check_original(answers, k)
        for share in (0.5, 0.75):
            check_default(answers, rule(keep_fraction=share, max_similarity=0.95))


def count(values: list[float], mode: str, k: int = 1, texts: list[str] | None = None) -> int:
    texts = texts or [str(i) for i in range(len(values))]
    return len(candidates(Answers("t", texts, [True] * len(texts), values), rule(mode), k).kept)


def test_published_cases_of_the_original() -> None:
    """32 distinct answers at 75 %: 24 candidates; ties at the threshold drop all tied ones."""
    distinct = [i / 32 for i in range(32)]
    assert count(distinct, "lastdedup-75") == 24
    assert count(distinct, "last-75", k=25) == 25
    assert count([0.1, 0.2, 0.2, 0.2], "lastdedup-75") == 1
    assert count([0.5], "lastdedup-75") == 0
    assert min_ranks([0.5, 0.2, 0.2, 0.9]) == [2, 0, 0, 3]
    # "-100" is a tenth
    assert count(distinct[:20], "last-100") == 2
    assert count(distinct[:20], "lastdedup-100") == 2
    # 25 unique ones of 32: only the single most similar goes
    repeated = [str(min(i, 24)) for i in range(32)]
    assert count([min(i, 24) / 32 for i in range(32)], "lastdedup-75", texts=repeated) == 24


def test_blank_answers_use_up_places_in_the_original() -> None:
    values, texts = [0.0, 0.0, 0.3, 0.4], ["", " ", "c", "d"]
    # ranks 0 0 2 3; the bound is the rank at place 2: both blanks pass it, and then go
    assert count(values, "last-5", texts=texts) == 0
    assert count(values, "last-75", texts=texts) == 1
    blank = Answers("t", ["", " ", "c"], [True] * 3, [0.0, 0.0, 0.3])
    assert candidates(blank, rule("alldedup"), 1).reasons == ["blank", "duplicate", None]


def test_equal_answers_share_a_similarity_in_the_original() -> None:
    """Leading spaces were gone before it embedded; here the embedding may have seen them."""
    answers = Answers("t", ["a", " a", "b", "c"], [True] * 4, [0.1, 0.3, 0.2, 0.4])
    assert candidates(answers, rule("last-5"), 1).kept == [0, 1]  # ranks 0 0 2 3


def test_draws_are_per_prompt() -> None:
    kept = [0, 2, 3, 5, 8, 9]
    full = shuffled(kept, seed=1, id="x", n=10)
    assert sorted(full) == kept
    # a candidate's turn does not depend on the others
    assert shuffled([2, 5, 9], 1, "x", 10) == [i for i in full if i in (2, 5, 9)]
    firsts = Counter(shuffled(kept, 1, str(i), 10)[0] for i in range(3000))
    assert set(firsts) == set(kept)
    assert max(abs(number - 500) for number in firsts.values()) < 5 * 500**0.5
    assert shuffled(kept, 2, "x", 10) != full


def test_what_lies_on_a_limit_stays() -> None:
    """0.55 * 100 and 1.1 * 10 are a little over, 0.29 * 100 a little under, what they should be."""

    def kept(target: str, texts: list[str], values: list[float], **options: float) -> int:
        answers = Answers(target, texts, [True] * len(texts), values)
        return len(candidates(answers, rule(**options), 1).kept)

    hundred = [str(i) for i in range(100)]
    assert kept("t", hundred, [0.5] * 100, keep_fraction=0.55) == 55
    assert kept("t" * 10, ["a" * 11, "a" * 10], [0, 0], keep_fraction=1, min_length_ratio=1.1) == 1
    assert (
        kept("t" * 100, ["a" * 29, "a" * 30], [0, 0], keep_fraction=1, max_length_ratio=0.29) == 1
    )
    values = [0.1, 0.2, 0.3, 0.4]
    window = {"min_similarity": 0.2, "max_similarity": 0.3}
    assert kept("t", ["a", "b", "c", "d"], values, keep_fraction=1, **window) == 2


def test_every_reason_has_its_place_in_the_list() -> None:
    texts = ["", "cut", "t", "dd", "dd", "s", "l" * 9, "ee", "ff", "gg", "hh"]
    values = [0, 0, 0, 0.3, 0.3, 0.3, 0.3, 0.1, 0.9, 0.3, 0.4]
    vectors = np.eye(11, dtype=np.float16)
    vectors[9] = vectors[3]
    options = rule(
        min_similarity=0.2, max_similarity=0.8, near_duplicate_similarity=0.9,
        min_length_ratio=2, max_length_ratio=4, keep_fraction=0.5,
    )  # fmt: skip
    answers = Answers("t", texts, [text != "cut" for text in texts], values, vectors)
    found = candidates(answers, options, 1)
    assert sorted(found.dropped) == sorted(selection.REASONS)
    assert found.kept == [3]
