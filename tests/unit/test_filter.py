"""Which answers become negatives: against the original project's rules, restated plainly."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import files_of, needs_shared, shared_rows, work
from hypothesis import given, settings
from hypothesis import strategies as st

from scmini.config import Config
from scmini.data import selection
from scmini.data.selection import Answers, candidates, draw, min_ranks, unfiltered, usable
from scmini.errors import DataError
from scmini.models.encoders import HashedNgramEncoder
from scmini.records import (
    Example,
    Response,
    Samples,
    read_pairs,
    read_table,
    write_examples,
    write_samples,
)
from scmini.stages import embed, filter
from scmini.stages.filter import group_similarity
from scmini.store import Work

MODES = [
    "all",
    "alldedup",
    "last-75",
    "last-5",
    "last-05",
    "last-0",
    "lastdedup-75",
    "lastdedup-125",
    "lastdedup-25",
]


def original(mode: str, outputs: list[str], similarities: list[float], k: int) -> list[str]:
    """The texts that the original project may draw from (facts of its construct_synthetic_data).

    `outputs` as its sampler stores them: without leading spaces. Ranks are stored before, by a
    quadratic rule: how many are strictly smaller.
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


def default_rule(answers: Answers, share: float) -> tuple[list[int], Counter[str]]:
    """DESIGN 5.6, one answer after another."""
    why: Counter[str] = Counter()
    unique: list[int] = []
    for index, text in enumerate(answers.texts):
        if text.strip() == "":
            why["blank"] += 1
        elif not answers.finished[index]:
            why["truncated"] += 1
        elif text.strip() == answers.target.strip():
            why["equal to the target"] += 1
        elif any(text.strip() == answers.texts[other].strip() for other in unique):
            why["duplicate"] += 1
        else:
            unique.append(index)
    number = 0
    while number < share * len(unique) - 1e-9:  # the smallest number that is the share or more
        number += 1
    remaining, kept = list(unique), []
    for _ in range(number):
        least = min(remaining, key=lambda index: answers.similarity[index])
        remaining.remove(least)
        kept.append(least)
    if remaining:
        why["too similar to the target"] += len(remaining)
    return sorted(kept), why


def check(answers: Answers, k: int) -> None:
    stored = [text.lstrip(" ") for text in answers.texts]
    for mode in MODES:
        found = candidates(answers, mode, 0.75, k)
        assert [stored[i] for i in found.kept] == original(mode, stored, answers.similarity, k), (
            mode
        )
        assert found.kept == sorted(set(found.kept))
        assert len(found.kept) + sum(found.dropped.values()) == len(stored)
    for share in (0.3, 0.5, 0.75, 1.0):
        found = candidates(answers, "default", share, k)
        assert (found.kept, found.dropped) == default_rule(answers, share)
    assert unfiltered(answers).kept == default_rule(answers, 1.0)[0]


texts = st.lists(
    st.sampled_from(["", " ", "\n", "a", " a", "a ", "b", "c", "d", "e\n", "t", " t"]), max_size=14
)


@st.composite
def any_answers(draw: Any) -> Answers:
    answers = draw(texts)
    size = len(answers)
    few = st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9])  # so that ties are common
    values = draw(st.lists(few, min_size=size, max_size=size))
    finished = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return Answers("t", answers, finished, values)


@settings(max_examples=400, deadline=None)
@given(answers=any_answers(), k=st.integers(1, 16))
def test_candidates_are_those_of_the_rules(answers: Answers, k: int) -> None:
    check(answers, k)


@needs_shared
@pytest.mark.parametrize(
    "name", ["self_instruct_user_responses", "humaneval_codegen16b_n100", "arena_hard_responses"]
)
def test_candidates_on_real_answers(name: str) -> None:
    rows = shared_rows(f"{name}.jsonl.gz")
    encoder = HashedNgramEncoder(512)
    encoder.fit([row["outputs"] for row in rows])
    for row in rows:
        # HumanEval's samples have no target: the most frequent one is taken for it
        target = row.get("target") or Counter(row["outputs"]).most_common(1)[0][0]
        vectors = encoder.encode([target, *row["outputs"]])
        values = group_similarity([len(vectors)], vectors.astype(np.float16))[0]
        answers = Answers(target, row["outputs"], [len(o) < 1000 for o in row["outputs"]], values)
        check(answers, 4)


def test_published_cases_of_the_original() -> None:
    """32 distinct answers at 75 %: 24 candidates; ties at the threshold drop all tied ones."""

    def count(values: list[float], mode: str, k: int = 1) -> int:
        texts = [str(i) for i in range(len(values))]
        return len(candidates(Answers("t", texts, [True] * len(texts), values), mode, 1.0, k).kept)

    distinct = [i / 32 for i in range(32)]
    assert count(distinct, "lastdedup-75") == 24
    assert count(distinct, "last-75", k=25) == 25
    assert count([0.1, 0.2, 0.2, 0.2], "lastdedup-75") == 1
    assert count([0.5], "lastdedup-75") == 0
    assert min_ranks([0.5, 0.2, 0.2, 0.9]) == [2, 0, 0, 3]


def test_draws_are_nested_and_per_prompt() -> None:
    kept = [0, 2, 3, 5, 8, 9]
    full = draw(kept, 6, seed=1, id="x", n=10)
    assert sorted(full) == kept
    for k in range(1, 6):
        assert draw(kept, k, 1, "x", 10) == full[:k]
    assert draw(kept, 9, 1, "x", 10) == full
    # a candidate's turn does not depend on the others
    assert draw([2, 5, 9], 3, 1, "x", 10) == [i for i in full if i in (2, 5, 9)]
    firsts = Counter(draw(kept, 1, 1, str(i), 10)[0] for i in range(3000))
    assert set(firsts) == set(kept)
    assert max(abs(number - 500) for number in firsts.values()) < 5 * 500**0.5
    assert draw(kept, 6, 2, "x", 10) != full


def test_group_similarity_is_the_cosine() -> None:
    rng = np.random.default_rng(0)
    groups = [3, 1, 5, 2]
    vectors = rng.normal(size=(11, 24)).astype(np.float16)
    vectors[5] = 0
    found, start = group_similarity(groups, vectors), 0
    for rows, values in zip(groups, found, strict=True):
        exact = vectors[start : start + rows].astype(np.float64)
        lengths = np.linalg.norm(exact, axis=1)
        dots = exact[1:] @ exact[0]
        expected = np.divide(
            dots, lengths[0] * lengths[1:], where=dots != 0, out=np.zeros(rows - 1)
        )
        assert values == pytest.approx(expected.tolist(), abs=1e-6)
        start += rows
    assert group_similarity([1, 1], vectors[:2]) == [[], []]


def prepare(tmp_path: Path, *, num: int = 6, rejected: bool = True) -> dict[str, Path]:
    """`num` prompts with ever more distinct answers: i + 1 of them, and one blank, for prompt i."""
    examples = [
        Example(
            str(i),
            [{"role": "user", "content": f"q{i}"}],
            "the target",
            ["bad"] if rejected else [],
        )
        for i in range(num)
    ]
    rows = []
    for i in range(num):
        answers = [f"answer {'x' * j}" for j in range(i + 1)] + [" "]
        rows.append(Samples(str(i), [1], [Response(text, [2], "stop") for text in answers]))
    write_examples(tmp_path / "data" / "train.jsonl", examples)
    write_samples(tmp_path / "sample" / "part-00000.parquet", rows[:4])
    write_samples(tmp_path / "sample" / "part-00001.parquet", rows[4:])
    inputs = {"data": tmp_path / "data", "sample": tmp_path / "sample"}
    embed.run(Config(), inputs, work(tmp_path / "embed"))
    return inputs | {"embed": tmp_path / "embed"}


def run(tmp_path: Path, methods: list[str], inputs: dict[str, Path], **options: Any) -> Work:
    made = work(tmp_path / "out")
    # jsonl: these prompts are not the zoo's
    config = Config.model_validate(
        {"methods": methods, "filter": options, "data": {"format": "jsonl", "path": "x"}}
    )
    filter.run(config, inputs, made)
    return made


def ids(made: Work, method: str) -> list[str]:
    return [pair.id for pair in read_pairs(made.path / "pairs" / f"{method}.jsonl")]


ALL = [
    "sft",
    "dpo",
    "spin",
    "self-contrast-1",
    "self-contrast-2",
    "self-contrast-4",
    "self-contrast-4-unfiltered",
]


def test_stage_writes_nested_pairs(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    made = run(tmp_path, ALL, inputs)
    names = [f"pairs/{method}.jsonl" for method in sorted(ALL) if method != "sft"]
    similarity = [f"similarity/part-0000{i}.parquet" for i in range(2)]
    assert sorted(files_of(made.path)) == sorted([*names, *similarity, "used.jsonl"])
    # 0.75 of 1, 2, ... 6 unique answers, rounded up: 1 2 3 3 4 5
    assert ids(made, "self-contrast-1") == list("012345")
    assert ids(made, "self-contrast-2") == list("12345")
    assert ids(made, "self-contrast-4") == list("45")
    assert ids(made, "self-contrast-4-unfiltered") == list("345")
    assert made.counts["self-contrast-4: prompts with too few candidates"] == 4
    assert made.counts["filtered answers: blank"] == 6
    assert made.counts["spin answers: blank"] == 6
    assert made.notes["effective_k"]["self-contrast-4"] == 4
    assert made.notes["prompts"] == {m: len(ids(made, m)) for m in ALL if m != "sft"}
    assert "perfect_share" not in made.notes
    pairs = {
        k: {p.id: p for p in read_pairs(made.path / "pairs" / f"self-contrast-{k}.jsonl")}
        for k in (1, 2, 4)
    }
    for id, pair in pairs[4].items():
        assert pair.response_index[:2] == pairs[2][id].response_index
        assert pair.response_index[:1] == pairs[1][id].response_index
        assert pair.rejected == [f"answer {'x' * index}" for index in pair.response_index]
    (dpo, *_) = read_pairs(made.path / "pairs" / "dpo.jsonl")
    assert (dpo.rejected, dpo.response_index, dpo.similarity) == (["bad"], [-2], [0.0])


def test_stage_keeps_the_least_similar(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    made = run(tmp_path, ["self-contrast-1"], inputs, keep_fraction=0.01)
    rows = [
        row
        for path in sorted((made.path / "similarity").glob("*.parquet"))
        for row in read_table(path).to_pylist()
    ]
    lowest = {row["id"]: min(row["similarity"][:-1]) for row in rows}  # the last is blank
    for pair in read_pairs(made.path / "pairs" / "self-contrast-1.jsonl"):
        assert pair.similarity == [lowest[pair.id]]


def test_used_is_the_union(tmp_path: Path) -> None:
    made = run(tmp_path, ALL, prepare(tmp_path))
    union: dict[str, set[int]] = {}
    for method in ALL[1:]:
        for pair in read_pairs(made.path / "pairs" / f"{method}.jsonl"):
            union.setdefault(pair.id, set()).update(pair.response_index)
    lines = (made.path / "used.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": id, "response_index": sorted(union[id])} for id in sorted(union)
    ]


def test_fewer_and_common(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    fewer = run(tmp_path / "a", ALL, inputs, allow_fewer=True)
    assert ids(fewer, "self-contrast-4") == list("012345")
    assert fewer.notes["effective_k"]["self-contrast-4"] == pytest.approx(
        (1 + 2 + 3 + 3 + 4 + 4) / 6, abs=1e-3
    )
    common = run(tmp_path / "b", ALL, inputs, common_subset=True)
    for method in ALL[2:]:
        assert ids(common, method) == list("45")
    assert common.counts["self-contrast-1: prompts outside the common subset"] == 4
    assert ids(common, "dpo") == list("012345")


def test_original_mode_and_its_need_for_room(tmp_path: Path) -> None:
    made = run(tmp_path, ["self-contrast-4"], prepare(tmp_path), mode="last-5")
    # of 7 answers the ranks below max(3, 4): four, of which the blank one goes
    assert not {"0", "1", "2"} & set(ids(made, "self-contrast-4"))


def test_only_the_data_sets_own_preferences(tmp_path: Path) -> None:
    inputs = {"data": prepare(tmp_path)["data"]}
    made = run(tmp_path, ["dpo"], inputs)
    assert sorted(files_of(made.path)) == ["pairs/dpo.jsonl", "used.jsonl"]
    assert ids(made, "dpo") == list("012345")


def test_methods_without_pairs_are_errors(tmp_path: Path) -> None:
    inputs = prepare(tmp_path, rejected=False)
    with pytest.raises(DataError, match="no training row has a rejected answer"):
        run(tmp_path, ["dpo"], inputs)
    with pytest.raises(DataError, match=r"self-contrast-9: no prompt has enough .*allow_fewer"):
        run(tmp_path, ["self-contrast-9"], inputs)


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    write_samples(
        inputs["sample"] / "part-00001.parquet",
        [Samples(i, [1], [Response("x", [2], "stop")]) for i in "45"],
    )
    with pytest.raises(DataError, match="prompt '4' does not fit its embeddings"):
        run(tmp_path, ["self-contrast-1"], inputs)


def test_again_gives_the_same_bytes(tmp_path: Path) -> None:
    inputs = prepare(tmp_path)
    first = run(tmp_path, ALL, inputs)
    before = files_of(first.path)
    again = run(tmp_path, ALL, inputs)  # in the same folder, leftovers present
    assert files_of(again.path) == before
    assert again.counts == first.counts


def test_zoo_notes_the_share_of_perfect_answers(tmp_path: Path) -> None:
    from scmini.data import zoo

    (example,) = zoo.examples(0, "train", 1, 0.0)
    perfect, flawed = str(example["target"]), str(example["rejected"][0])  # type: ignore[index]
    write_examples(tmp_path / "data" / "train.jsonl", [Example(**(example | {"target": "x"}))])  # type: ignore[arg-type]
    responses = [Response(text, [1], "stop") for text in (perfect, flawed)]
    write_samples(
        tmp_path / "sample" / "part-00000.parquet", [Samples(str(example["id"]), [1], responses)]
    )
    inputs = {"data": tmp_path / "data", "sample": tmp_path / "sample", "embed": tmp_path / "embed"}
    embed.run(Config(), inputs, work(inputs["embed"]))
    made = work(tmp_path / "out")
    filter.run(Config.model_validate({"methods": ["self-contrast-2"]}), inputs, made)
    assert made.notes["perfect_share"] == {"self-contrast-2": 0.5}


def test_usable_keeps_repeated_answers() -> None:
    answers = Answers("t", ["a", "a", "", "t", "b"], [True, True, True, True, False], [0.0] * 5)
    found = usable(answers)
    assert found.kept == [0, 1]
    assert found.dropped == {selection.BLANK: 1, selection.TARGET: 1, selection.TRUNCATED: 1}
