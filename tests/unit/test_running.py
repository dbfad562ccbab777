"""The running task: curves, lines, and the file by which a second terminal learns of it."""

import json
import math
import os
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmini.locks import locked
from scmini.screen import ASCII, Glyphs
from scmini.view.running import (
    PROGRESS,
    Curve,
    ProgressFile,
    Running,
    read_progress,
    sparkline,
    task_lines,
)

SIGNS = Glyphs().sparks
NOW = Running(
    "dpo spin", 65.0, 3, 8, "steps", 0.5, 10.0, {"loss": 0.25, "at": "x"}, {"loss": [0.5, 0.25]}
)
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(NUMBERS, max_size=300), st.integers(0, 40))
def test_a_sparkline_is_never_too_wide(values: list[float], width: int) -> None:
    drawn = sparkline(values, width, SIGNS)
    finite = [value for value in values if math.isfinite(value)]
    assert len(drawn) == min(width, len(finite))
    assert set(drawn) <= set(SIGNS)


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=40))
def test_higher_is_drawn_higher(values: list[int]) -> None:
    drawn = sparkline([float(value) for value in values], 40, SIGNS)
    heights = [SIGNS.index(sign) for sign in drawn]
    for one, two in pairwise(values):
        a, b = heights[values.index(one)], heights[values.index(two)]
        assert (a <= b) if one <= two else (a >= b)
    if len(set(values)) > 1:
        assert (min(heights), max(heights)) == (0, len(SIGNS) - 1)


@given(st.lists(NUMBERS, max_size=700))
def test_a_curve_stays_short_and_keeps_the_mean(values: list[float]) -> None:
    curve = Curve()
    for value in values:
        curve.add(value)
    finite = [value for value in values if math.isfinite(value)]
    assert len(curve.values) < 128
    if len(finite) < 128:
        assert curve.values == finite
    steady = Curve()
    for number in range(512):
        steady.add(float(number))
    assert steady.values == [3.5 + 8 * n for n in range(64)]


def test_lines_of_a_task() -> None:
    def read(now: Running, width: int, glyphs: Glyphs) -> list[str]:
        return [
            "".join(text for text, _ in line).rstrip() for line in task_lines(now, width, glyphs)
        ]

    now = replace(NOW, memory="memory 1.0 GiB (peak 2.0 GiB)")
    assert read(now, 80, Glyphs()) == [
        "  dpo spin  1:05",
        f"  {'━' * 9}{'─' * 15}  37 %  3/8 steps  10.0 s left  0.5 steps/s",
        "  loss 0.25     █▁",
        "  at x  memory 1.0 GiB (peak 2.0 GiB)",
    ]
    assert read(now, 40, ASCII)[1:3] == [
        "  ####--------  37 %  3/8 steps  10.0 s left  0.5 steps/s",
        "  loss 0.25     #_",
    ]
    many = replace(NOW, done=3072, total=24576, unit="answers", left=56.0, rate=384.0)
    assert read(many, 80, ASCII)[1] == (
        "  #-----------  12 %  3072/24576 answers  56.0 s left  384 answers/s"
    )
    assert len(read(many, 81, ASCII)[1]) == 80, "one column stays free"
    assert read(Running("sft: starting", 0.2), 80, ASCII) == ["  sft: starting"]
    flat = replace(NOW, figures={"loss": 0.25}, curves={"loss": [float("nan")]})
    assert read(flat, 80, ASCII)[2] == "  loss 0.25"


@pytest.fixture
def told(tmp_path: Path) -> Any:
    """Run folder in which a run tells what it does, and its file."""
    with locked(tmp_path / ".lock", "busy"):
        file = ProgressFile(tmp_path)
        file.write(NOW)
        yield tmp_path, file


def test_what_is_told_is_read(told: Any) -> None:
    folder, file = told
    assert read_progress(folder) == NOW
    file.write(replace(NOW, done=4))  # less than a second later
    assert read_progress(folder) == NOW
    file.remove()
    assert read_progress(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == [".lock"]


def test_what_a_killed_run_left_means_nothing(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock", "busy"):
        ProgressFile(tmp_path).write(NOW)
    assert (tmp_path / PROGRESS).exists()
    assert read_progress(tmp_path) is None
    with locked(tmp_path / ".lock", "busy"):  # the next run has not said anything yet
        ProgressFile(tmp_path)
        assert not (tmp_path / PROGRESS).exists()


def test_what_is_old_means_nothing(told: Any) -> None:
    folder, _ = told
    os.utime(folder / PROGRESS, (1, 1))
    assert read_progress(folder) is None


def test_odd_files_are_passed_over(told: Any) -> None:
    folder, _ = told
    path = folder / PROGRESS
    path.unlink()
    os.mkfifo(path)
    assert read_progress(folder) is None
    path.unlink()
    (folder / "other").write_text(json.dumps(asdict(NOW)))
    path.symlink_to("other")
    assert read_progress(folder) is None
    path.unlink()
    path.write_bytes(b" " * (1 << 17))
    assert read_progress(folder) is None
    path.write_text(json.dumps({**asdict(NOW), "done": 10**400}))
    assert read_progress(folder) is None


def test_a_full_disk_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    file = ProgressFile(tmp_path)
    file.write(NOW)
    file.remove()
    assert list(tmp_path.iterdir()) == []


VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(list(asdict(NOW))), VALUES), st.binary(max_size=20))
def test_whatever_the_file_holds(changed: dict[str, Any], noise: bytes) -> None:
    folder = Path(os.environ["PYTEST_FUZZ_FOLDER"])
    with locked(folder / ".lock", "busy"):
        for content in (noise, json.dumps({**asdict(NOW), **changed}).encode()):
            (folder / PROGRESS).write_bytes(content)
            found = read_progress(folder)
            if found is not None:
                for width in (9, 80):
                    assert len(task_lines(found, width, ASCII)) <= 4


@pytest.fixture(autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_FUZZ_FOLDER", str(tmp_path_factory.mktemp("told")))
