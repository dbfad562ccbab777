"""Benchmarks and their judge in a whole run: questions, answers, verdicts, scores, report."""

import json
from pathlib import Path
from typing import Any

import pytest
import standins
from data_helpers import write_lines
from fake_judge import Body, Judge, said, top
from test_recipes import in_one_process

from scmini.cli import _print_results
from scmini.config_file import load_config

METHODS = ["sft", "self-contrast-1"]


def questions(folder: Path) -> list[str]:
    """Files as their authors publish them; `--set` items that name them."""
    mt_bench = [
        {"question_id": 81, "category": "writing", "turns": ["Tell of a goose.", "Now shorter."]},
        {
            "question_id": 111,
            "category": "math",
            "turns": ["1 + 1?", "Times 3?"],
            "reference": ["2", "6"],
        },
        {"question_id": 82, "category": "unjudged", "turns": ["Say nothing.", "Again."]},
    ]
    alpaca = [{"instruction": f"Name animal {n}.", "dataset": "selfinstruct"} for n in range(3)]
    gsm8k = [
        {"question": f"What is {n} + 1?", "answer": f"So it is.\n#### {n + 1}"} for n in range(3)
    ]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    return [
        f"benchmark.mt_bench_questions={write_lines(folder / 'mt_bench.jsonl', mt_bench)}",
        f"benchmark.alpaca_eval_questions={folder / 'alpaca.json'}",
        f"benchmark.gsm8k_questions={write_lines(folder / 'gsm8k.jsonl', gsm8k)}",
        *("benchmark.tasks=[mt-bench, alpaca-eval, gsm8k]", "benchmark.max_new_tokens=24"),
    ]


def strict(body: Body, before: int) -> Any:
    """Prefers the second output, rates with 7, and cannot rate what it is told not to."""
    asked = body["messages"][-1]["content"]
    if body.get("logprobs"):
        return said("M", **{"logprobs": top(m=-1.5, M=-0.25)})
    return said("I would rather not." if "Say nothing." in asked else "Good.\n\nRating: [[7]]")


def test_benchmarks_from_questions_to_the_report(
    tmp_path: Path,
    judge: Judge,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judge.answer = strict
    recipe = "hh-rlhf-7b-smoke"
    sets = [
        *standins.overrides(tmp_path, recipe),
        *questions(tmp_path),
        *(f"judge.base_url={judge.url}", "judge.model=strict", "judge.max_retries=1"),
        *("data.num_train=16", "data.num_test=4", "sample.n=4", f"methods=[{', '.join(METHODS)}]"),
    ]
    run = tmp_path / "run"
    in_one_process(load_config(recipe, sets), run)

    lines = (run / "benchmarks" / "sft" / "mt_bench" / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [row["question_id"] for row in answers] == [81, 111, 82]
    assert all(len(row["choices"][0]["turns"]) == 2 for row in answers)
    results = json.loads((run / "report" / "results.json").read_text())["methods"]
    for method in METHODS:
        found = results[method]["benchmarks"]
        assert set(found) == {"mt-bench", "alpaca-eval", "gsm8k"}
        assert (found["mt-bench"]["value"], found["mt-bench"]["n"]) == (7, 4)
        assert found["mt-bench"]["failed"] == 2  # never counted as a score
        assert found["gsm8k"]["n"] + found["gsm8k"]["failed"] == 3
    assert results["sft"]["benchmarks"]["alpaca-eval"]["value"] is None  # it is the baseline
    compared = results["self-contrast-1"]["benchmarks"]["alpaca-eval"]
    assert compared["n"] == 3
    assert 0 < compared["value"] < 100
    layout = run / "report" / "mt_bench"
    assert {path.stem for path in (layout / "model_answer").iterdir()} == set(METHODS)
    assert len((layout / "model_judgment" / "strict_single.jsonl").read_text().splitlines()) == 12
    page = (run / "report" / "index.html").read_text()
    assert "mt-bench" in page.lower()
    capsys.readouterr()
    _print_results(run / "report", "model")
    assert "7.00" in capsys.readouterr().out
