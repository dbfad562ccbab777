"""Lines that are redrawn in place: what a person reads, whatever was drawn before."""

import io
import os
from typing import Any

import pytest
from fake_terminal import FakeTerminal
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from scmini.display import Display
from scmini.screen import Line, Screen, is_live

LINES = st.lists(st.text("ab 日é", max_size=50), max_size=12)
STEPS = st.lists(st.one_of(LINES, st.text("xyz ", min_size=1, max_size=60)), max_size=8)


def plain(lines: list[str]) -> list[Line]:
    return [((line, ""),) for line in lines]


def shown(line: str, width: int) -> str:
    """What is left of a line of the view."""
    from rich.cells import cell_len, set_cell_size

    whole = cell_len(line) <= width - 1
    return line.rstrip() if whole else f"{set_cell_size(line, width - 2).rstrip()}…"


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(10, 60), st.integers(3, 15))
def test_the_last_view_stands_below_all_that_was_said(
    steps: list[list[str] | str], width: int, height: int
) -> None:
    terminal = FakeTerminal(width, height)
    screen = Screen(terminal.console)
    above: list[str] = []
    view: list[str] = []
    for step in steps:
        if isinstance(step, str):
            screen.above(Text(step))
            with terminal.console.capture() as printed:
                terminal.console.print(Text(step))
            above += printed.get().splitlines()
        else:
            screen.draw(plain(step))
            view = step[: height - 1]
        expected = [*(line.rstrip() for line in above), *(shown(line, width) for line in view)]
        while expected and not expected[-1]:
            expected.pop()
        assert terminal.text == expected


@pytest.mark.parametrize("narrow", [20, 33])
def test_a_terminal_that_becomes_narrower(narrow: int) -> None:
    terminal = FakeTerminal(60, 12)
    screen = Screen(terminal.console)
    screen.above(Text("before"))
    screen.draw(plain(["x" * 58, "y" * 30, "end"]))
    terminal.resize(narrow, 12)
    screen.draw(plain(["x" * 58, "end"]))
    assert terminal.text == ["before", f"{'x' * (narrow - 2)}…", "end"]
    terminal.resize(50, 5)
    screen.draw(plain(["1", "2", "3", "4", "5", "6"]))
    assert terminal.text == ["before", "1", "2", "3", "4"]


def test_only_what_changed_is_written() -> None:
    terminal = FakeTerminal(60, 12)
    screen = Screen(terminal.console)
    screen.draw(plain(["first", "second", "third"]))
    before = len(terminal.written())
    screen.draw(plain(["first", "second", "third"]))
    assert len(terminal.written()) == before
    screen.draw(plain(["first", "changed", "third"]))
    fresh = terminal.written()[before:]
    assert "changed" in fresh
    assert "first" not in fresh
    assert "third" not in fresh


def test_the_end() -> None:
    for keep, left in ((True, ["a", "b", "after"]), (False, ["after"])):
        terminal = FakeTerminal(60, 12)
        screen = Screen(terminal.console)
        screen.draw(plain(["a", "b"]))
        screen.close(keep=keep)
        terminal.console.print("after")
        assert terminal.text == left


def test_nothing_that_moves_the_cursor_gets_through() -> None:
    terminal = FakeTerminal(60, 12)
    screen = Screen(terminal.console)
    screen.draw(plain(["a\x1b[2Jb\nc\rd\x07\te", "\u202eturned\u2028x", "a\udc80b"]))
    assert terminal.text == ["a [2Jb c d  e", " turned x", "a b"]


def test_colours_and_signs_are_those_of_the_terminal() -> None:
    def drawn(**options: str) -> str:
        terminal = FakeTerminal(60, 12, **options)
        Screen(terminal.console).draw([(("red", "red"), (" 日", ""))])
        return terminal.written()

    assert "\x1b[31mred" in drawn()
    assert "\x1b[31m" not in drawn(NO_COLOR="1")
    latin = FakeTerminal(60, 12, encoding="latin-1")
    screen = Screen(latin.console)
    screen.draw([((f"{screen.glyphs.done} 日 ä", ""),)])
    assert latin.text == ["+ ? ä"]


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def fileno(self) -> int:
            return spare

    spare = os.open(os.devnull, os.O_WRONLY)
    console = Console(file=Gone(), force_terminal=True, width=60, height=10)
    with Display(live=True, console=console) as display:
        display.start("sft")
        display.line("x")
    os.close(spare)


@pytest.mark.parametrize(
    ("terminal", "term", "live"),
    [
        *((True, "xterm", True), (True, "dumb", False), (True, "", False)),
        (False, "xterm", False),
    ],
)
def test_where_it_is_live(
    terminal: bool, term: str, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")  # asks for colours, not for a screen
    assert is_live(Stream()) is live


def test_a_bar_for_each_task() -> None:
    terminal = FakeTerminal(80, 12)
    with Display(live=True, console=terminal.console) as display:
        display.start("sft")
        event: dict[str, Any] = {
            "done": 1,
            "total": 4,
            "unit": "[b]steps",
            "figures": {"loss": 0.5},
        }
        display.progress("sft", event)
        display.start("other")
        assert terminal.text == [
            "sft ━━━━━─────────────── 1/4 [b]steps (25 %), loss 0.5",
            "other ────────────────────",
        ]
        display.line("sft: warning: [b]careful\x1b[2J")
        assert "\x1b[33mwarning:" in terminal.written()
        display.finish("sft", "done")
    assert terminal.text == ["sft: warning: [b]careful", "sft: done"]
