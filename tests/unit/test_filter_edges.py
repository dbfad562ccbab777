"""The stage `filter` on odd answers: none, strange characters, many shards, and its own options."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import needs_shared, shared_rows, work
from test_filter import ids, run, similarities
from test_selection import original

from scmini.config import Config
from scmini.errors import DataError
from scmini.records import (
    Example,
    Response,
    Samples,
    read_pairs,
    write_examples,
    write_samples,
)
from scmini.stages import embed, filter

TARGET = "a target of some words"


def inputs_of(
    tmp_path: Path,
    answers: dict[str, list[str]],
    failures: dict[str, str] | None = None,
    targets: dict[str, str] | None = None,
) -> dict[str, Path]:
    """A folder for each stage before, with these answers by prompt id, all in one shard."""
    rows = [
        Samples(id, [1], [Response(text, [2], "stop") for text in texts], (failures or {}).get(id))
        for id, texts in answers.items()
    ]
    prompt = [{"role": "user", "content": "q\u2028\U0001f600"}]
    examples = [Example(id, prompt, (targets or {}).get(id, TARGET)) for id in answers]
    write_examples(tmp_path / "data" / "train.jsonl", examples)
    write_samples(tmp_path / "sample" / "part-00000.parquet", rows)
    inputs = {"data": tmp_path / "data", "sample": tmp_path / "sample"}
    embed.run(Config(), inputs, work(tmp_path / "embed"))
    return inputs | {"embed": tmp_path / "embed"}


def test_prompts_without_answers_are_counted_with_their_reason(tmp_path: Path) -> None:
    failures = {"b": "engine failed:\nstack", "c": "prompt leaves no room for an answer"}
    answers = {"a": ["x", "y"], "b": [], "c": [], "d": [], "e": ["x", "y", "z"]}
    inputs = inputs_of(tmp_path, answers, failures)
    made = run(tmp_path, ["self-contrast-1"], inputs)
    assert ids(made, "self-contrast-1") == ["a", "e"]
    expected = {
        "prompts without answers: engine failed:": 1,
        "prompts without answers: prompt leaves no room for an answer": 1,
        "prompts without answers: no reason recorded": 1,
        "self-contrast-1: prompts with too few candidates": 3,
    }
    assert {key: made.counts[key] for key in expected} == expected
    assert made.notes["rules"]["filtered"]["prompts"] == 5
    rows = similarities(made)
    assert [(row["id"], len(row["similarity"]), len(row["dropped"])) for row in rows] == [
        *(("a", 2, 2), ("b", 0, 0), ("c", 0, 0), ("d", 0, 0), ("e", 3, 3)),
    ]


def test_answers_that_did_not_come_to_their_end(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, {"a": ["cut", "whole", "broken off"]})
    path = inputs["sample"] / "part-00000.parquet"
    ends = ["length", "stop", "abort"]
    responses = [Response(t, [2], end) for t, end in zip(["c", "w", "b"], ends, strict=True)]
    write_samples(path, [Samples("a", [1], responses)])
    made = run(tmp_path, ["self-contrast-1", "spin"], inputs)
    assert similarities(made)[0]["dropped"] == ["truncated", None, "truncated"]
    assert made.notes["rules"]["spin"]["dropped"] == {"truncated": 2}


def test_fewer_is_not_none(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, {"a": ["x", "y"], "b": [], "c": [" "], "d": ["x"]})
    made = run(tmp_path, ["self-contrast-2"], inputs, allow_fewer=True, keep_fraction=1.0)
    assert ids(made, "self-contrast-2") == ["a", "d"]
    assert made.counts["self-contrast-2: prompts with too few candidates"] == 2


def test_prompts_that_were_not_sampled(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, {"a": ["x"], "c": ["x"]})
    lines = (inputs["data"] / "train.jsonl").read_text().split("\n")
    lines = [lines[0], lines[0].replace('"a"', '"b"'), lines[1], lines[1].replace('"c"', '"d"')]
    (inputs["data"] / "train.jsonl").write_text("\n".join(lines))
    made = run(tmp_path, ["self-contrast-1"], inputs)
    assert ids(made, "self-contrast-1") == ["a", "c"]
    assert made.counts["prompts without answers: not sampled"] == 1  # the last ones were not due


@pytest.mark.parametrize("answers", [{}, {"a": [], "b": []}, {"a": ["", " \n"], "b": [TARGET]}])
def test_nothing_to_choose_from(tmp_path: Path, answers: dict[str, list[str]]) -> None:
    inputs = inputs_of(tmp_path, answers)
    with pytest.raises(DataError, match=r"self-contrast-1: no prompt has enough candidates"):
        run(tmp_path, ["self-contrast-1"], inputs)


def test_a_prompt_without_a_vector_of_its_target(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, {"a": [], "b": ["x", "y"]})
    beside = inputs["embed"] / "part-00000.ids.json"
    listed = json.loads(beside.read_text())
    listed[0]["rows"], listed[1]["rows"] = 0, 4
    beside.write_text(json.dumps(listed))
    with pytest.raises(DataError, match=r"part-00000\.npy: prompt 'a' has no target"):
        run(tmp_path, ["self-contrast-1"], inputs)


def test_strange_characters(tmp_path: Path) -> None:
    blank = ["", "\t\r\n", "\u00a0\u3000", "\u2028\u2029\x1f"]
    strange = [
        *("\u200b", "\ufeff", "\x00", "\x00\x00", "\u202e abc", "\U0001f468\u200d\U0001f469"),
        *("e\u0301", "\u00e9", "\ufffd", "line\u2028break", "\r\nx\ry"),
    ]
    repeated = ["\u3000e\u0301\u00a0", "\u200b\n"]
    inputs = inputs_of(tmp_path, {"\U0001d54f\n": [*blank, *strange, *repeated, f"\n{TARGET}\n"]})
    made = run(tmp_path, ["self-contrast-11-unfiltered"], inputs)
    row = made.notes["rules"]["unfiltered"]
    assert row["dropped"] == {"blank": 4, "equal to the target": 1, "duplicate": 2}
    (pair,) = read_pairs(made.path / "pairs" / "self-contrast-11-unfiltered.jsonl")
    assert sorted(pair.rejected) == sorted(strange)
    assert pair.id == "\U0001d54f\n"
    assert all(-1 <= value <= 1 for value in pair.similarity)


def test_options_touch_the_default_rule_alone(tmp_path: Path) -> None:
    answers = {
        str(i): [
            "a target of some other words", "a target of some more other words",
            "nothing in common", "nothing in common at all here", "short", "very long " * 20,
            TARGET,
        ]
        for i in range(3)
    }  # fmt: skip
    methods = ["spin", "self-contrast-1", "self-contrast-4-unfiltered"]
    inputs = inputs_of(tmp_path, answers)
    plain = run(tmp_path / "plain", methods, inputs, keep_fraction=1.0)
    limited = run(
        tmp_path / "limited", methods, inputs, keep_fraction=1.0, min_length_ratio=0.5,
        max_length_ratio=2.0, max_similarity=0.5, near_duplicate_similarity=0.6,
    )  # fmt: skip
    for method in ("spin", "self-contrast-4-unfiltered"):
        paths = [made.path / "pairs" / f"{method}.jsonl" for made in (plain, limited)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert plain.notes["rules"]["filtered"]["dropped"] == {"equal to the target": 3}
    assert limited.notes["rules"]["filtered"] == {
        **{"prompts": 3, "answers": 21, "kept": 3},
        "dropped": {
            **{"equal to the target": 3, "too short": 3, "too long": 3},
            **{"above max_similarity": 6, "near-duplicate": 3},
        },
    }
    for row in similarities(limited):
        assert row["dropped"][2:4] == [None, "near-duplicate"]
    for spin in ("spin", "unfiltered"):
        assert plain.notes["rules"][spin] == limited.notes["rules"][spin]


def test_candidates_of_last_depend_on_k(tmp_path: Path) -> None:
    """The largest k's are shown; each method draws from its own."""
    texts = [f"{'word ' * i}end {i}" for i in range(8)]
    inputs = inputs_of(tmp_path, {str(i): texts for i in range(40)})
    made = run(tmp_path, ["self-contrast-1", "self-contrast-6"], inputs, mode="last-25")
    for row in similarities(made):
        ordered = sorted(range(8), key=lambda i: row["similarity"][i])
        assert sorted(ordered[:6]) == [i for i in range(8) if row["dropped"][i] is None]
    drawn = {
        index
        for pair in read_pairs(made.path / "pairs" / "self-contrast-1.jsonl")
        for index in pair.response_index
    }
    assert drawn == set(ordered[:2])


@needs_shared
@pytest.mark.parametrize("mode", ["all", "alldedup", "last-75", "lastdedup-75"])
def test_candidates_on_real_answers_end_to_end(tmp_path: Path, mode: str) -> None:
    """With k = n and fewer allowed, a pair has all candidates."""
    found_rows = shared_rows("self_instruct_user_responses.jsonl.gz")[::3]
    rows = {str(i): row for i, row in enumerate(found_rows)}
    targets = {id: row["target"] for id, row in rows.items()}
    inputs = inputs_of(tmp_path, {id: row["outputs"] for id, row in rows.items()}, targets=targets)
    made = run(tmp_path, ["self-contrast-8"], inputs, mode=mode, allow_fewer=True)
    pairs = read_pairs(made.path / "pairs" / "self-contrast-8.jsonl")
    found = {pair.id: sorted(text.lstrip(" ") for text in pair.rejected) for pair in pairs}
    expected = {}
    for row in similarities(made):
        texts = [text.lstrip(" ") for text in rows[row["id"]]["outputs"]]
        values = [row["similarity"][texts.index(text)] for text in texts]
        if kept := original(mode, texts, values, 8):
            expected[row["id"]] = sorted(kept)
    assert found == expected
    assert len(found) > 50


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    def peak(shards: int) -> int:
        folder = tmp_path / str(shards)
        vectors = np.random.default_rng(0).normal(size=(8 * 9, 4096)).astype(np.float16)
        examples, size = [], 8
        for number in range(shards):
            names = [f"{number}-{i}" for i in range(size)]
            examples += [Example(n, [{"role": "user", "content": "q" * 9999}], "t") for n in names]
            texts = [f"answer {j} {'x' * 999}" for j in range(8)]
            rows = [Samples(n, [1], [Response(t, [2] * 99, "stop") for t in texts]) for n in names]
            write_samples(folder / "sample" / f"part-{number:05d}.parquet", rows)
            (folder / "embed").mkdir(exist_ok=True)
            np.save(folder / "embed" / f"part-{number:05d}.npy", vectors)
            listed = [{"id": name, "rows": 9} for name in names]
            (folder / "embed" / f"part-{number:05d}.ids.json").write_text(json.dumps(listed))
        write_examples(folder / "data" / "train.jsonl", examples)
        del examples
        made = work(folder / "out")
        config = Config.model_validate(
            {"methods": ["self-contrast-4"], "data": {"format": "jsonl", "path": "x"}}
        )
        tracemalloc.start()
        filter.run(config, {key: folder / key for key in ("data", "sample", "embed")}, made)
        found: Any = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # pays for imports
    assert peak(24) < 1.2 * peak(4)
