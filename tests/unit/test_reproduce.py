"""docs/reproduce.md says what the planner and the result files say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import reproduce


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def test_the_document_is_fresh() -> None:
    text = reproduce.DOCUMENT.read_text("utf-8")
    assert reproduce.rewritten(text) == text, "python bench/reproduce.py"


def test_what_nobody_measured_is_said(tmp_path: Path) -> None:
    assert reproduce.results(tmp_path).count("not measured") == 2 * (8 + 8 + 7)


def test_results_of_a_run_are_shown(tmp_path: Path) -> None:
    row: dict[str, Any] = {"win_rate": 81.25, "win_rate_ci95": [80.0, 82.5]}
    row |= {"length_controlled_win_rate": None, "length_controlled_win_rate_ci95": None}
    methods = {"sft": row, "self-contrast-16": {**row, "win_rate": None}}
    (tmp_path / "hh-rlhf-7b.json").write_text(json.dumps({"methods": methods}))
    lines = reproduce.results(tmp_path).splitlines()
    assert "| hh-rlhf-7b | sft | below 77 % | 81.2 % (80.0 to 82.5) | not measured |" in lines
    assert lines[9] == (
        "| hh-rlhf-7b | self-contrast-16 | between 77 and 87 % | not measured | not measured |"
    )


def test_a_document_without_blocks() -> None:
    with pytest.raises(SystemExit, match="has no block"):
        reproduce.rewritten("nothing")
