"""What the browser of prompts is given: even and extreme ones, within a budget, safe in a page."""

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import fake_run
import hostile_run
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmini.data.selection import REASONS, SIMILAR
from scmini.evaluation.report import browser
from scmini.evaluation.report.page import stage_table, visible
from scmini.evaluation.report.training_prompts import (
    Answer,
    TrainingPrompt,
    paired_methods,
    training_prompts,
)
from scmini.evaluation.report.wording import MISSING, Unit
from scmini.records import Generation, Reward
from scmini.stages import report
from scmini.store import Work

UNIT = Unit(1, 3)


def rows_of(
    rewards: dict[str, list[float]], text: str = "answer", **options: Any
) -> dict[str, Any]:
    """Islands of made-up answers; the targets have reward 0."""
    return browser.answer_rows(
        {
            method: [
                Generation(f"p{i}", [{"role": "user", "content": "?"}], text, "target")
                for i in range(len(values))
            ]
            for method, values in rewards.items()
        },
        {
            m: [Reward(f"p{i}", r, 0.0) for i, r in enumerate(values)]
            for m, values in rewards.items()
        },
        UNIT,
        list(rewards)[-1],
        **options,
    )


@given(st.integers(0, 300), st.data())
def test_any_beginning_of_the_order_is_spread_evenly(count: int, data: st.DataObject) -> None:
    order = list(browser.spread(count))
    assert sorted(order) == list(range(count))
    if count > 1:
        size = data.draw(st.integers(1, count))
        taken = sorted(order[:size])
        gaps = [b - a for a, b in zip([-1, *taken], [*taken, count], strict=True)]
        assert max(gaps) <= 4 * count / size + 1


def test_extremes_take_turns() -> None:
    found = list(islice(browser.extremes([[0.0, 5.0, -5.0, 1.0], [9.0, 0.0, 0.0, -9.0]]), 8))
    assert found[:4] == [1, 2, 0, 3]
    assert set(found) == {0, 1, 2, 3}
    assert list(browser.extremes([])) == []


def test_all_prompts_are_shown_if_they_fit() -> None:
    found = rows_of({"sft": [0.1] * 30, "dpo": [0.2] * 30})
    assert [row["id"] for row in found["rows"]] == [f"p{i}" for i in range(30)]
    assert found["methods"] == ["dpo", "sft"]
    assert found["columns"] == [1, 0]
    assert found["rows"][3]["rewards"] == [0.2, 0.1]


def test_a_budget_keeps_even_and_extreme_prompts() -> None:
    rewards = [0.001 * i for i in range(1000)]
    rewards[501], rewards[777] = 50.0, -50.0
    budget = 20_000
    found = rows_of({"sft": rewards}, budget=budget)
    assert sum(len(browser.island(row).encode()) + 1 for row in found["rows"]) <= budget
    positions = [int(row["id"][1:]) for row in found["rows"]]
    assert positions == sorted(positions)
    assert {501, 777} <= set(positions)
    assert 0 < found["extreme"] <= len(positions) / browser.EVENLY_BEFORE_EXTREME
    assert len(rows_of({"sft": rewards}, budget=1)["rows"]) == 1
    ungraded = browser.answer_rows(
        {"sft": [Generation("a", [{"role": "user", "content": "?"}], "x", "y")]}, {}, UNIT, "sft"
    )
    assert (ungraded["graded"], ungraded["extreme"]) == (False, 0)
    assert "rewards" not in ungraded["rows"][0]


def test_one_huge_text_uses_up_little_of_the_budget() -> None:
    found = rows_of({"sft": [0.0] * 40}, text="\x00" * 1_000_000, budget=10_000_000)
    (text,) = found["rows"][0]["texts"]
    assert text.count("[U+0000]") == browser.TEST_CHARS
    assert text.endswith("[... 996,000 more characters]")
    assert len(found["rows"]) == 40


_ANY = st.text(st.characters(), max_size=40)


@given(st.recursive(_ANY | st.integers() | st.none(), lambda x: st.lists(x, max_size=3)))
def test_an_island_is_the_same_json_and_ends_no_element(value: Any) -> None:
    text = browser.island(value)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == value


@given(st.text(st.characters(exclude_categories=()), max_size=40))
def test_visible_text_can_be_written_and_hides_nothing(text: str) -> None:
    shown = visible(text)
    shown.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    if text.isascii() and text.isprintable():
        assert shown == text


def test_what_a_plan_says_stands_beside_what_was_used() -> None:
    used: dict[str, dict[str, Any]] = {
        "data": {"seconds": 3.0, "peak_gib": None},
        "dpo:dpo": {"seconds": 60.0, "peak_gib": 20.5},
        "dpo:spin": {"seconds": 120.0, "peak_gib": 21.25},
    }
    planned = {
        "dpo:dpo": {"seconds": 50.0, "peak_gib": 21.0},
        "dpo:spin": {"seconds": None, "peak_gib": 22.0},
    }
    found = stage_table(used, planned)
    assert found["heads"][0] == "Time planned"
    assert found["rows"] == [
        ("data", "", [MISSING, "3.0 s", MISSING, MISSING]),
        ("dpo", "2 methods", [MISSING, "3 min 00 s", "22.00", "21.25"]),
    ]
    assert found["every"][1] == ("dpo:dpo", "", ["50.0 s", "1 min 00 s", "21.00", "20.50"])
    alone = stage_table({"data": used["data"]}, {})
    assert alone == {
        "heads": ["Time", "Peak memory, GiB"],
        "rows": [("data", "", ["3.0 s", MISSING])],
        "every": [],
    }


def folders(root: Path, **sections: Any) -> tuple[Any, dict[str, Path]]:
    config = hostile_run.config(**sections)
    return config, hostile_run.stage_folders(root, config, prompts=6)


def test_training_prompts_against_a_plain_look(tmp_path: Path) -> None:
    config, inputs = folders(tmp_path)
    methods = paired_methods(config)
    assert methods == ["self-contrast-16", "dpo", "self-contrast-4", "self-contrast-16-unfiltered"]
    found = training_prompts({"t3", "t11"}, methods, config, inputs)
    assert [prompt.id for prompt in found] == ["t3", "t11"]
    first = found[0]
    assert first.num_answers == 32
    assert first.answers[0] == Answer("The goose says oink 0.", pytest.approx(0.206), None)
    assert [a.reason for a in first.answers[:32]].count(SIMILAR) == 6
    assert first.num_candidates == 24
    assert first.taken["self-contrast-4"] == [0, 1, 2, 3]
    assert first.taken["self-contrast-16"] == list(range(14))
    assert first.taken["dpo"] == [32]  # the data set's own, behind the sampled ones
    assert first.answers[32] == Answer("The goose says oink 0.")
    row = browser.training_rows(found, ["t11", "t3"], 20)["rows"][0]
    assert row["count"] == {
        **{"self-contrast-16": 14, "dpo": 1},
        **{"self-contrast-4": 4, "self-contrast-16-unfiltered": 14},
    }
    texts = [text for text, _, _ in row["answers"]]
    assert [texts[i] for i in row["taken"]["self-contrast-4"]] == [
        first.answers[i].text for i in range(4)
    ]
    kinds = [kind for _, _, kind in row["answers"]]
    assert kinds.count(-2) == 1  # the data set's own
    assert {REASONS[kind] for kind in kinds if kind >= 0} == {"blank", "truncated", SIMILAR}


def test_training_prompts_without_embeddings_or_answers(tmp_path: Path) -> None:
    config, inputs = folders(tmp_path)
    for path in (inputs["filter"] / "similarity").iterdir():
        path.unlink()
    (prompt,) = training_prompts({"t5"}, ["self-contrast-4"], config, inputs)
    assert (prompt.num_answers, prompt.num_candidates) == (32, 32)
    assert prompt.answers[3].similarity is None
    del inputs["sample"]
    (bare,) = training_prompts({"t5"}, ["dpo", "self-contrast-4"], config, inputs)
    assert (bare.num_answers, len(bare.answers)) == (0, 5)
    row = browser.training_rows([bare], ["t5"], 20)["rows"][0]
    assert row["taken"] == {"dpo": [0], "self-contrast-4": [1, 2, 3, 4]}


def test_a_later_round_of_spin_has_answers_of_its_own(tmp_path: Path) -> None:
    config, inputs = folders(tmp_path)
    inputs["filter:self-contrast-4"] = inputs["filter"]  # as later rounds have their own filter
    (prompt,) = training_prompts({"t5"}, ["self-contrast-4"], config, inputs)
    assert prompt.taken["self-contrast-4"] == [32, 33, 34, 35]


def test_training_rows_keep_to_their_budget() -> None:
    made = [
        TrainingPrompt(f"t{i}", [{"role": "user", "content": "q"}], "t", [Answer("x" * 500)], 1)
        for i in range(100)
    ]
    for prompt in made:
        prompt.taken["self-contrast-1"] = [0]
    order = browser.training_order([prompt.id for prompt in made])
    found = browser.training_rows(made, order, 100, budget=10_000)
    assert 10 < len(found["rows"]) < 20
    assert {row["id"] for row in found["rows"]} == set(order[: len(found["rows"])])
    assert found["filtered"] == [True]
    assert [browser.is_filtered(m) for m in ("dpo", "spin", "self-contrast-2-unfiltered")] == [
        *(False, False, False)
    ]


def run(root: Path, config: Any, inputs: dict[str, Path]) -> str:
    work = Work(root / "out")
    work.path.mkdir()
    report.run(config, inputs, work)
    return (work.path / "index.html").read_text("utf-8")


def test_few_prompts_get_no_intervals(tmp_path: Path) -> None:
    config = fake_run.config(["sft", "dpo"])
    page = run(tmp_path, config, fake_run.stage_folders(tmp_path, config, prompts=9))
    assert "No intervals are drawn: 9 test prompts are too few for them." in page
    assert "Bars and bands" not in page
    table = page[page.index('<h2 id="figure">') : page.index('<h2 id="limits">')]
    assert not re.search(r"<small>[\d.]+ to [\d.]+</small>", table)


def test_figures_and_a_plan_of_their_own(tmp_path: Path) -> None:
    config = fake_run.config(["sft", "self-contrast-4"])
    inputs = fake_run.stage_folders(tmp_path, config, prompts=12)
    metrics = inputs["train:self-contrast-4"] / "metrics.jsonl"
    drift = ',"drift/chosen_per_token":-0.1,"kl/rejected":2.0}'
    metrics.write_text(metrics.read_text().replace("}", drift))
    (tmp_path / "out").mkdir()
    plan = {"gpu": "rtx-4090", "stages": {"sft": {"seconds": 60, "peak_gib": 20.0}}}
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    work = Work(tmp_path / "out")
    report.run(config, inputs, work)
    names = {path.name for path in (work.path / "figures").iterdir()}
    assert names == {
        f"{name}.{end}"
        for name in ("similarity", "training-sft", "training-self-contrast-4")
        for end in ("svg", "png")
    }
    page = (work.path / "index.html").read_text("utf-8")
    assert "Planned for rtx-4090" in page
    assert "Time planned" in page
    assert "Drift: log-probability of the chosen" in page
    assert json.loads((work.path / "results.json").read_text())["plan"] == plan
