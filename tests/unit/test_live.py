"""The view of a whole run, as a person reads it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_stages import config
from fake_terminal import FakeTerminal

from scmini import console, display
from scmini.errors import Interrupted, StageFailed
from scmini.stage_graph import Task, tasks
from scmini.view import gauges, live, running
from scmini.view.live import RunDisplay

SWEEP = [f"self-contrast-{k}" for k in (1, 2, 4, 8, 16)]
METHODS = ["sft", "sft-continued", "dpo", "spin", *SWEEP, "self-contrast-16-unfiltered"]


class Clock:
    """The time, as the modules under test see it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    for module in (live, display, running, gauges):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield made
    console.listen(None)  # the views of these tests are not closed


def event(done: int, total: int, unit: str = "steps", **figures: Any) -> dict[str, Any]:
    return {"done": done, "total": total, "unit": unit, "figures": figures}


def sweep() -> list[Task]:
    return tasks(config(f"methods={json.dumps(METHODS)}", "sample.n=16"))


def in_the_middle(terminal: FakeTerminal, folder: Path, clock: Clock, title: str = "toy") -> Any:
    """A run whose third method of stage dpo is at 61 %."""
    todo = sweep()
    shown = RunDisplay(title, folder, todo, live=True, console=terminal.console)
    shown.__enter__()
    dpo = [task for task in todo if task.stage == "dpo"]
    for task in todo[: todo.index(dpo[0])]:
        shown.kept(task, 60.0)
    for task in dpo[:2]:
        shown.begin(task)
        clock.now += 100
        shown.done(task, 100.0, "done in 100 s")
    shown.expected = dict.fromkeys(todo, 90.0)
    shown.prepare(dpo[2])
    clock.now += 10
    shown.begin(dpo[2])
    for done in range(123):
        shown.progress(dpo[2].label, event(done, 200, loss=0.7 - done / 400, margin=done / 100))
        clock.now += 0.5
        shown.tick(None)
    return shown


def test_a_sweep_of_ten_methods_fits_a_small_terminal(tmp_path: Path, clock: Clock) -> None:
    terminal = FakeTerminal(80, 24)
    in_the_middle(terminal, tmp_path / "r", clock)
    lines = terminal.text
    assert len(lines) < 24
    assert lines[0].startswith(" toy  ")
    assert lines[0].endswith("4:32 so far, about 40 min left")
    assert [line.split() for line in lines[2:14]] == [
        *([sign, name, "kept", "1:00"] for sign, name in [("=", "data"), ("=", "base")]),
        ["=", "sft", "kept", "2", "of", "2", "2:00"],
        *(["=", name, "kept", "1:00"] for name in ("sample", "embed", "filter", "reference")),
        ["▸", "dpo", "running", "2", "of", "8", "4:32", "self-contrast-1"],
        *(
            ["·", n, "waiting", "0", "of", "10", "about", "15", "min"]
            for n in ("generate", "reward")
        ),
        ["·", "report", "waiting", "about", "2", "min"],
        [],
    ]
    assert lines[14:] == [
        "  dpo self-contrast-1  1:12",
        f"  {'━' * 14}{'─' * 10}  61 %  122/200 steps  39.3 s left  1.98 steps/s",
        "  loss 0.395    ███▇▇▆▆▆▅▅▅▄▄▃▃▃▂▂▁▁▁  margin 1.22     ▁▁▁▂▂▃▃▃▄▄▄▅▅▆▆▆▇▇███",
    ]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 10), (20, 5), (9, 2)])
def test_every_size(width: int, height: int, tmp_path: Path, clock: Clock) -> None:
    terminal = FakeTerminal(width, height)
    shown = in_the_middle(terminal, tmp_path, clock, "a very long name of a configuration 日本")
    shown.progress(
        "dpo self-contrast-1", event(130, 200, "steps" * 30, loss=float("nan"), a="x" * 300)
    )
    clock.now += 1
    shown.tick(None)
    assert len(terminal.text) < height
    if height >= 10:
        text = "\n".join(terminal.text)
        assert "▸ dpo" in text
        assert "65 %" in text
    if height == 10:
        assert "    7 more done, 2 more waiting" in terminal.text


def test_warnings_stay_and_the_last_example_is_seen(tmp_path: Path, clock: Clock) -> None:
    rows = [("prompt", ["why⟦</s>⟧", "so\x1b[2J"]), ("chosen", ["because"])]
    told = {"title": "example e", "rows": rows, "text": "not this"}
    example = ["  prompt    why⟦</s>⟧", "            so", "  chosen    because"]
    for height in (40, 20):
        terminal = FakeTerminal(80, height)
        shown = in_the_middle(terminal, tmp_path, clock)
        shown.line("dpo: warning: careful")
        shown.example("dpo", told)
        text = terminal.text
        assert text[0] == "dpo: warning: careful"
        if height == 40:
            assert text[-4:] == ["dpo: example e", *example]
        else:  # no room in the view: it scrolls by
            assert text[1:5] == ["dpo: example e", *example]
        shown.line("dpo: warning: again")
        assert terminal.text.count("dpo: example e") == 1


def test_what_failed_stays_in_sight_and_what_is_done_does_not(tmp_path: Path, clock: Clock) -> None:
    for how, sign, error in (
        ("failed", "✗", StageFailed("dpo", 1, "x")),
        ("stopped", "■", Interrupted("x")),
    ):
        terminal = FakeTerminal(80, 24)
        shown = in_the_middle(terminal, tmp_path, clock)
        shown.ended(Task("dpo", "self-contrast-1"), how)
        shown.__exit__(type(error), error, None)
        assert len(terminal.text) == 13
        assert f"{sign} dpo {how} 2 of 8 3:20".split() in [line.split() for line in terminal.text]
        shown = in_the_middle(terminal := FakeTerminal(80, 24), tmp_path, clock)
        shown.__exit__(None, None, None)
        assert terminal.text == []


def test_what_can_be_said_of_the_whole_run(tmp_path: Path, clock: Clock) -> None:
    data, sft, report = todo = [Task("data"), Task("sft"), Task("report")]
    shown = RunDisplay("toy", tmp_path, todo, live=False)
    assert shown.whole() == ""
    shown.expected = {sft: 600.0}
    assert shown.whole() == "at least 10 min left"
    shown.expected = dict.fromkeys(todo, 600.0)
    assert shown.whole() == "about 30 min left"
    shown.kept(data, 1.0)
    shown.begin(sft)
    clock.now += 100
    assert shown.whole() == "about 18 min left"
    shown.progress("sft", event(0, 10))
    clock.now += 100
    shown.progress("sft", event(1, 10))  # 900 s more at this rate: longer than in the last run
    assert shown.whole() == "about 25 min left"
    shown.expected = {}
    assert shown.whole() == "at least 15 min left"
    shown.done(sft, 200.0, "done")
    shown.expected = {report: 30.0}
    assert shown.whole() == "under a minute left"
    shown.kept(report, 1.0)
    assert shown.whole() == ""


def test_plain_lines(tmp_path: Path, clock: Clock, capsys: Any) -> None:
    todo = [Task("data"), Task("sft"), Task("sft", "sft-continued")]
    with RunDisplay("toy", tmp_path, todo, live=False) as shown:
        shown.kept(todo[0], 1.0)
        shown.prepare(todo[1])
        shown.begin(todo[1])
        for done in range(0, 101):
            shown.progress("sft", event(done, 100, loss=0.5))
            clock.now += 0.3
            shown.tick(None)
        shown.done(todo[1], 30.0, "done in 30.0 s")
        shown.begin(todo[2])
        shown.done(todo[2], 30.0, "done in 30.0 s")
        shown.expected = {}
        shown.stage_ended("sft")
    assert capsys.readouterr().err.splitlines() == [
        "sft: starts",
        "sft: 0/100 steps (0 %), loss 0.5",
        "sft: 34/100 steps (34 %), 3.33 steps/s, 19.8 s left, loss 0.5",
        "sft: 68/100 steps (68 %), 3.33 steps/s, 9.6 s left, loss 0.5",
        "sft: 100/100 steps (100 %), 3.33 steps/s, loss 0.5",
        "sft: done in 30.0 s",
        "sft sft-continued: starts",
        "sft sft-continued: done in 30.0 s",
        "stage 2 of 2 done",
    ]


def test_a_second_terminal_learns_what_runs(tmp_path: Path, clock: Clock) -> None:
    shown = in_the_middle(FakeTerminal(80, 24), tmp_path, clock)
    told = json.loads((tmp_path / running.PROGRESS).read_bytes())
    assert (told["label"], told["done"], told["total"]) == ("dpo self-contrast-1", 122, 200)
    assert told["whole"] == "about 40 min left"
    assert len(told["curves"]["loss"]) == 123
    shown.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_it_is_redrawn_twice_a_second_at_most(tmp_path: Path, clock: Clock) -> None:
    terminal = FakeTerminal(80, 24)
    shown = in_the_middle(terminal, tmp_path, clock)
    before = terminal.written()
    for done in range(123, 173):
        clock.now += 0.1
        shown.progress("dpo self-contrast-1", event(done, 200, loss=0.1))
        shown.tick(None)
    frames = terminal.written()[len(before) :].count("\x1b[?7l")
    assert 8 <= frames <= 10
    assert len(terminal.written()) - len(before) < frames * 900
