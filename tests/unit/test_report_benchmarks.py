"""Benchmarks in the report: nothing failed is a score, nothing ungraded a win, official layouts."""

import csv
import html
import io
import json
import math
import random
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import fake_benchmarks
import fake_run
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmini.config import Config
from scmini.errors import DataError
from scmini.evaluation.benchmarks import official_layouts
from scmini.evaluation.benchmarks import results as benchmark_results
from scmini.stages import report
from scmini.store import Work

METHODS = ("sft", "dpo", "spin", "spin-2", "self-contrast-16")
JUDGED = {
    "data": {"format": "jsonl", "path": "x.jsonl"},
    "benchmark": {"tasks": ["mt-bench", "alpaca-eval", "gsm8k"]},
    "judge": {"model": "org/judge-70b"},
}
UNGRADED = {"reward": {"grader": "none"}}


def make(root: Path, config: Config, *, judged: bool = True) -> tuple[Path, dict[str, Path]]:
    inputs = fake_run.stage_folders(root, config, prompts=60)
    if judged:
        fake_benchmarks.add(inputs, config)
    fake_benchmarks.add_rounds(inputs, config)
    if config.grader == "none":
        inputs = {key: path for key, path in inputs.items() if not key.startswith("reward:")}
    work = Work(root / "out")
    work.path.mkdir()
    report.run(config, inputs, work)
    return work.path, inputs


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    config = fake_run.config(METHODS, **JUDGED, reward={"grader": "model"})
    return make(tmp_path_factory.mktemp("graded"), config)


@pytest.fixture(scope="module")
def ungraded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return make(tmp_path_factory.mktemp("none"), fake_run.config(METHODS, **JUDGED, **UNGRADED))


def rows_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text("utf-8"))["methods"]


def text_of(folder: Path, section: str) -> str:
    page = (folder / "index.html").read_text("utf-8")
    part = page[page.index(f'<h2 id="{section}">') :]
    end = part.find("<h2", 4)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", part[:end])).split())


def test_scores_of_the_judge_stand_beside_the_others(graded: Any) -> None:
    rows = rows_of(graded[0])
    assert rows["targets"]["benchmarks"] == {}
    found = rows["self-contrast-16"]["benchmarks"]
    assert {name: entry["value"] for name, entry in found.items()} == {
        **{"mt-bench": 6.0, "gsm8k": 0.6, "alpaca-eval": 60.0}
    }
    assert found["mt-bench"]["failed"] == 1
    with open(graded[0] / "results.csv", newline="") as handle:
        lines = {row["method"]: row for row in csv.DictReader(handle)}
    assert float(lines["dpo"]["mt-bench"]) == 5
    assert float(lines["dpo"]["mt-bench_high"]) == pytest.approx(5.2)
    assert lines["dpo"]["mt-bench_failed"] == "1"
    assert lines["targets"]["mt-bench"] == ""
    assert lines["spin-2"]["iterations"] == "2"


def test_page_names_judge_failures_and_what_is_not_comparable(graded: Any) -> None:
    text = text_of(graded[0], "benchmarks")
    assert "mt-bench mean rating, 1 to 10" in text
    assert "dpo 5.00 4.80 to 5.20 first turn 6.50 n = 7, 1 failed" in text
    assert "at equal length 41.5" in text
    assert "org/judge-70b, with scmini's own wording" in text
    assert "published tables among them, are not comparable" in text
    assert "over the answers of sft" in text
    assert "These are in no score: mt-bench: 1 of sft (timeout 1), 1 of dpo (timeout 1)" in text
    assert "plain preferences: alpaca-eval: 2 of sft, 2 of dpo" in text
    cost = text_of(graded[0], "cost")
    assert "Judging took 50 requests, 45,000 tokens in and 5,000 out, 0.50 USD." in cost
    assert "MT-Bench by category Method writing" in text
    assert "second turn" not in text  # nobody rated it


def test_time_table_has_every_stage_and_the_rounds_of_spin(graded: Any) -> None:
    stages = json.loads((graded[0] / "results.json").read_text())["stages"]
    assert {"benchmark:dpo", "judge:dpo", "filter:spin-2", "sample:spin-2"} <= set(stages)
    order = [name.partition(":")[0] for name in stages]
    assert order == sorted(order, key=report._ORDER.index)
    assert list(stages).index("filter") < list(stages).index("filter:spin-2")


def test_later_iterations_of_spin_have_pairs_of_their_own(graded: Any) -> None:
    rows = rows_of(graded[0])
    assert rows["spin-2"]["training"] == {"prompts": 20, "effective_k": 1.0, "iterations": 2}
    assert rows["spin"]["training"]["iterations"] == 1
    page = (graded[0] / "index.html").read_text("utf-8")
    assert '<th scope="col">spin-2</th>' in page  # what its own filter made of the answers
    assert "2 iterations" in page
    assert "each further iteration draws anew" in text_of(graded[0], "limits")


def test_lengths_stand_beside_the_win_rates(graded: Any) -> None:
    rows = rows_of(graded[0])
    row = rows["self-contrast-16"]
    assert row["length_ratio"] == pytest.approx(row["mean_length"] / row["mean_target_length"])
    low, high = row["mean_length_ci95"]
    assert low <= row["mean_length"] <= high
    assert "Its win rate at equal length is" in text_of(graded[0], "limits")
    assert f"{row['length_ratio']:.2f} of the targets" in text_of(graded[0], "figure")


def test_without_a_grader_nothing_pretends_to_be_a_win_rate(ungraded: Any) -> None:
    folder, _ = ungraded
    assert not list(folder.glob("win_rate.*"))
    assert not list(folder.glob("mean_length.*"))
    assert (folder / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    for name, row in rows_of(folder).items():
        for key in ("win_rate", "win_rate_ci95", "mean_reward", "mean_reward_ci95", "ties"):
            assert row[key] is None, (name, key)
        assert row["n"] == 60
        assert row["mean_length"] > 0
    page = (folder / "index.html").read_text("utf-8")
    assert "The answers were not graded. mt-bench (mean rating, 1 to 10): self-contrast-16" in page
    assert "Win rate" not in page.replace("win rates are over the answers of sft", "")
    assert "None" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert "beats the target" not in page
    assert "Training curves of dpo" in page
    assert "taken as negatives" in page


def test_without_grader_and_benchmarks_lengths_are_drawn(tmp_path: Path) -> None:
    config = fake_run.config(["sft", "dpo"], **UNGRADED)
    folder, _ = make(tmp_path, config, judged=False)
    assert {path.name for path in folder.iterdir()} == {
        *("index.html", "mean_length.png", "mean_length.svg", "results.csv", "results.json"),
        "figures",
    }
    assert "Benchmarks" not in (folder / "index.html").read_text("utf-8")


def test_lengths_alone_against_a_plain_count(ungraded: Any) -> None:
    folder, inputs = ungraded
    lines = (inputs["generate:dpo"] / "generations.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    row = rows_of(folder)["dpo"]
    lengths = [len(answer["response"]) for answer in answers]
    assert row["mean_length"] == pytest.approx(sum(lengths) / 60)
    assert row["mean_target_length"] == len("It says honk.")
    assert row["longer"] == sum(n > 13 for n in lengths) / 60


def test_unanswered_prompts_are_named_where_nobody_graded(tmp_path: Path) -> None:
    config = fake_run.config(["sft", "dpo"], **UNGRADED)
    inputs = fake_run.stage_folders(tmp_path, config, prompts=3)
    path = inputs["generate:dpo"] / "generations.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    work = Work(tmp_path)
    with pytest.raises(DataError, match=r"generate-dpo.*no answer to prompt 'p2'"):
        report.run(config, inputs, work)
    (inputs["generate:sft"] / "generations.jsonl").write_text("")
    with pytest.raises(DataError, match=r"generate-sft.*is empty"):
        report.run(config, inputs, work)


def test_answers_that_nobody_judged_are_said_to_be_so(tmp_path: Path) -> None:
    config = fake_run.config(["sft"], **{**JUDGED, "judge": {}}, **UNGRADED)
    folder, _ = make(tmp_path, config)
    text = text_of(folder, "benchmarks")
    assert "Method gsm8k exact_match sft 0.350" in text
    assert "The answers to MT-Bench and AlpacaEval are written, but no method has a score" in text
    assert (folder / "mt_bench" / "model_answer" / "sft.jsonl").is_file()
    assert not (folder / "mt_bench" / "model_judgment").exists()
    assert not (folder / "alpaca_eval" / "leaderboard.csv").exists()
    header, targets, sft = (folder / "results.csv").read_text().splitlines()
    assert dict(zip(header.split(","), sft.split(","), strict=True))["gsm8k"] == "0.35"
    assert "mt-bench" not in header
    assert targets.startswith("targets,,")


def test_a_benchmark_without_a_single_score_is_told_of(tmp_path: Path) -> None:
    config = fake_run.config(["sft"], benchmark={"tasks": ["mt-bench"]}, **UNGRADED)
    inputs = fake_run.stage_folders(tmp_path, config, prompts=3)
    fake_benchmarks.add(inputs, config)
    inputs = {key: path for key, path in inputs.items() if not key.startswith("reward:")}
    scores = inputs["benchmark:sft"] / "scores.json"
    work = Work(tmp_path / "out")
    for content in ({}, {"mt-bench": fake_benchmarks.score(None, n=0, failed=4)}):
        scores.write_text(json.dumps(content))
        work.path.mkdir(exist_ok=True)
        report.run(config, inputs, work)
        text = text_of(work.path, "benchmarks")
        assert "no method has a score" in text
        assert ("not measured 4 failed" in text) == bool(content)
        assert not (work.path / "benchmarks.png").exists()


def test_layout_of_fastchat(graded: Any) -> None:
    folder = graded[0] / "mt_bench"
    questions = [json.loads(line) for line in (folder / "question.jsonl").open()]
    assert [q["question_id"] for q in questions] == [81, 82, 83, 84]
    assert {p.stem for p in (folder / "model_answer").iterdir()} == set(METHODS)
    (judged,) = (folder / "model_judgment").iterdir()
    assert judged.name == "org-judge-70b_single.jsonl"
    rows = [json.loads(line) for line in judged.open(encoding="utf-8")]
    assert [row["model"] for row in rows[::8]] == list(METHODS)
    assert sum(row["score"] == -1 for row in rows) == len(METHODS)


def test_layout_of_alpaca_eval(graded: Any) -> None:
    folder = graded[0] / "alpaca_eval"
    outputs = json.loads((folder / "dpo" / "model_outputs.json").read_text())
    assert {row["generator"] for row in outputs} == {"dpo"}
    assert (folder / "dpo" / "annotations.json").is_file()
    header, *lines = csv.reader(io.StringIO((folder / "leaderboard.csv").read_text()))
    assert header[:2] == ["", "win_rate"]
    assert [line[0] for line in lines] == list(METHODS)
    row = dict(zip(header, lines[1], strict=True))
    assert float(row["win_rate"]) == pytest.approx(100 * (0.25 + 0.5 + 1) / 3)
    assert (row["n_wins"], row["n_wins_base"], row["n_draws"], row["n_total"]) == (*"1113",)
    assert float(row["length_controlled_winrate"]) == 41.5


@given(
    preferences=st.lists(
        st.one_of(st.none(), st.just(0), st.just(1.5), st.floats(1, 2)), max_size=12
    ),
    first=st.booleans(),
)
def test_leaderboard_against_a_plain_count(preferences: list[Any], first: bool) -> None:
    """Whichever side the method is on; 0 is an old draw, null is nothing."""
    names = ("m", "base") if first else ("base", "m")
    annotations = [
        {
            **{"generator_1": names[0], "generator_2": names[1]},
            **{"output_1": "aaaa", "output_2": "bb", "preference": preference},
        }
        for preference in preferences
    ]
    row = official_layouts.leaderboard_row("m", annotations, {})
    told = [1.5 if p == 0 else p for p in preferences if p is not None]
    wins = [2 - p if first else p - 1 for p in told]
    assert row["n_total"] == len(wins)
    assert row["n_draws"] == sum(w == 0.5 for w in wins)
    assert row["n_wins"] - row["n_wins_base"] == sum((w > 0.5) - (w < 0.5) for w in wins)
    assert row["win_rate"] == (pytest.approx(100 * mean(wins)) if wins else None)
    if len(wins) > 1:
        error = 100 * stdev(wins) / math.sqrt(len(wins))
        assert row["standard_error"] == pytest.approx(error)
    assert row["avg_length"] == ((4 if first else 2) if preferences else None)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4", "gpt-4"),
        ("org/m:1", "org-m-1"),
        ("../../x", "x"),
        ("", "judge"),
        ("日本", "judge"),
    ],
)
def test_a_judge_is_a_file_name(model: str, name: str) -> None:
    assert official_layouts.judge_file_name(model) == name


def test_broken_scores_are_named(tmp_path: Path) -> None:
    config = fake_run.config(["sft"], **JUDGED, **UNGRADED)
    inputs = {"data": tmp_path, "benchmark:sft": tmp_path / "b"}
    inputs["benchmark:sft"].mkdir()
    path = inputs["benchmark:sft"] / "scores.json"
    good = fake_benchmarks.score(0.5)
    cases = {
        "[]": "expected a JSON object",
        "{": r"scores\.json",
        '{"gsm8k": 3}': "gsm8k: expected an object",
        json.dumps({"gsm8k": good | {"value": math.nan}}): "NaN is no number",
        json.dumps({"gsm8k": good | {"failed": "3"}}): "gsm8k: field 'failed': unexpected '3'",
        json.dumps({"gsm8k": good | {"ci95": [1]}}): "expected two numbers",
        json.dumps({"gsm8k": {k: v for k, v in good.items() if k != "n"}}): "'n' is missing",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            benchmark_results.read_scores(config.methods, inputs)
    path.unlink()
    with pytest.raises(DataError, match=r"scores\.json"):
        benchmark_results.read_scores(config.methods, inputs)


def test_different_questions_are_refused(tmp_path: Path) -> None:
    config = fake_run.config(["sft", "dpo"], **JUDGED, **UNGRADED)
    inputs = fake_run.stage_folders(tmp_path, config, prompts=3)
    fake_benchmarks.add(inputs, config)
    with (inputs["benchmark:dpo"] / "mt_bench" / "questions.jsonl").open("a") as handle:
        handle.write('{"question_id": 99}\n')
    work = Work(tmp_path / "out")
    work.path.mkdir()
    with pytest.raises(DataError, match=r"benchmark-dpo.*are not those of sft"):
        report.run(config, inputs, work)
    (inputs["judge:sft"] / "alpaca_eval" / "annotations.json").write_text("{}")
    with pytest.raises(DataError, match="expected a list of JSON objects"):
        official_layouts.read_annotations(inputs["judge:sft"] / "alpaca_eval" / "annotations.json")


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ({"prompts": "a/judge_prompts.jsonl"}, "with the prompts of judge_prompts.jsonl"),
        ({"mt_bench_mode": "pairwise", "baseline": "dpo"}, "with that of dpo, in both orders"),
        ({"alpaca_eval_annotator": "weighted"}, "package alpaca-eval with its annotator weighted"),
        ({"alpaca_eval_reference": "a/ref.json"}, "over the reference outputs of ref.json"),
    ],
)
def test_how_was_judged_is_told(judge: dict[str, Any], told: str) -> None:
    settings = {**JUDGED, "judge": JUDGED["judge"] | judge}
    config = fake_run.config(["sft", "dpo"], **settings, **UNGRADED)
    entries = {name: fake_benchmarks.score(5.0) for name in benchmark_results.JUDGED}
    texts = [text for _, text in benchmark_results.remarks(config, {"sft": entries, "dpo": {}})]
    assert told in " ".join(texts)
    assert all("compar" in text.lower() for text in texts)


def test_many_benchmarks_are_in_the_table_and_some_in_the_figure() -> None:
    rng = random.Random(0)
    of_method = {f"lm-eval/t{i}": fake_benchmarks.score(rng.random()) for i in range(9)}
    scores = {"sft": of_method, "dpo": dict(list(of_method.items())[:2])}
    assert len(benchmark_results.table(scores, "dpo")["heads"]) == 9
    assert benchmark_results.table(scores, "dpo")["rows"][1]["cells"][5] == ("not run", [])
    assert len(benchmark_results.panels(scores)) == benchmark_results.MOST_PANELS
    config = fake_run.config(["sft", "dpo"], **UNGRADED)
    assert dict(benchmark_results.remarks(config, scores))["Figure"].startswith(
        "It shows the first"
    )
