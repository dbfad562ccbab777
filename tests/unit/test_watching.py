"""The status again and again."""

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmini.console import clean
from scmini.view import watching
from scmini.view.running import Running

STATES = ("done", "stale", "missing", "running", "failed")


def status(*states: str) -> dict[str, Any]:
    return {"stages": [{"name": f"s{n}", "method": None, "state": s} for n, s in enumerate(states)]}


def render(found: dict[str, Any]) -> str:
    return "\n".join(["stage  state", *(f"{r['name']} {r['state']}" for r in found["stages"])])


SEQUENCE = [
    *[status("running", "missing")] * 3,
    *[status("done", "running")] * 2,
    status("done", "done"),
    status("never", "seen"),
]


def test_a_block_for_each_change(capsys: Any) -> None:
    waits: list[float] = []
    looks = iter(SEQUENCE)
    last = watching.watch(lambda: next(looks), render, live=False, interval=3.0, pause=waits.append)
    assert last == SEQUENCE[5]
    assert waits == [3.0] * 5
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.splitlines()[-1] for block in blocks] == [
        "0 of 2 done, 1 missing; running: s0",
        "1 of 2 done; running: s1",
        "2 of 2 done",
    ]
    assert blocks[0].startswith(render(SEQUENCE[0]))


@pytest.mark.parametrize("live", [False, True])
def test_ctrl_c_ends_it_quietly(live: bool, capsys: Any) -> None:
    def pause(_: float) -> None:
        raise KeyboardInterrupt

    last = watching.watch(lambda: SEQUENCE[0], render, live=live, pause=pause)
    assert last == SEQUENCE[0]
    assert capsys.readouterr().out.endswith("0 of 2 done, 1 missing; running: s0\n")


def test_on_a_terminal_the_whole_table_stays(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setenv("COLUMNS", "60")
    looks = iter([status(*["done"] * 20, "running"), status(*["done"] * 21)])
    last = watching.watch(lambda: next(looks), render, live=True, pause=lambda _: None)
    assert capsys.readouterr().out.endswith(f"{render(last)}\n21 of 21 done\n")


def test_on_a_terminal_what_runs_is_below(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("COLUMNS", "80")
    runs = Running("dpo spin", 60.0, 3, 8, "steps", 0.5, 10.0, whole="about 12 min left")
    looks = iter([status("done", "running"), status("done", "done")])
    told = iter([runs, None])
    watching.watch(
        lambda: next(looks), render, running=lambda: next(told), live=True, pause=lambda _: None
    )
    out = clean(capsys.readouterr().out)
    assert "  dpo spin  1:00" in out
    assert "37 %  3/8 steps  10.0 s left" in out
    assert "  the whole run: about 12 min left" in out
    assert out.endswith("2 of 2 done\n")


def test_nobody_reads_any_more() -> None:
    script = (
        "from scmini.view import watching\n"
        "states = iter([['missing'], ['running'], ['missing']] * 1000)\n"
        "look = lambda: {'stages': [{'name': 'a', 'method': None, 'state': next(states)[0]}]}\n"
        "watching.watch(look, lambda found: 'x' * 70000, live=False, pause=lambda _: None)\n"
        "print('goes nowhere')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=30), error) == (0, "")


@given(st.lists(st.sampled_from(STATES), max_size=60), st.integers(8, 50))
def test_what_runs_stays_in_sight(states: list[str], height: int) -> None:
    found = status(*states)
    lines = watching.fitting(found, render, height)
    assert len(lines) < height
    assert lines[-1] == watching.summary(found)
    live = [s for s in states if s in ("running", "failed")]
    shown = [line.split()[1] for line in lines[1:] if line.startswith("s")]
    if len(live) <= height - 4:
        assert [s for s in shown if s in ("running", "failed")] == live
    if len(states) <= height - 4:
        assert lines == [*render(found).split("\n"), watching.summary(found)]
    names = [int(line.split()[0][1:]) for line in lines[1:] if line.startswith("s")]
    assert names == sorted(names)
