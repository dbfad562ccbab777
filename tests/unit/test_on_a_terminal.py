"""A run on a real (pseudo) terminal, with stand-ins for the stages: what is read in the end."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_stages import behave, config
from fake_terminal import FakeTerminal

from scmini.run_folder import RunFolder


def on_a_terminal(
    tmp_path: Path, run_dir: Path, terminal: FakeTerminal, watch: Callable[[int], None], **env: str
) -> int:
    """`scmini run all` up to sft; `watch` is called with the terminal's handle."""
    script = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from scmini import pipeline, cli\n"
        f"pipeline.WORKER = [sys.executable, {str(tmp_path / 'worker.py')!r}]\n"
        f"sys.exit(cli.main(['run', 'all', '-o', {str(run_dir)!r}, '--until', 'sft']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", **env}
    for name in ("LINES", "COLUMNS"):
        environment.pop(name, None)
    ours, theirs = pty.openpty()
    size = struct.pack("HHHH", terminal.height, terminal.width, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    end = time.monotonic() + 60
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.5)[0]:
                terminal.raw.write(os.read(ours, 65536))
                watch(ours)
    except OSError:  # on Linux the end of a terminal is an error
        pass
    finally:
        os.close(ours)
    return process.wait(60)


@pytest.fixture
def toy(tmp_path: Path, executed: Any) -> Path:
    folder = tmp_path / "toy"
    folder.mkdir()
    RunFolder(folder).begin(config("methods=[sft]"), [])
    return folder


@pytest.mark.parametrize("size", [(80, 24), (200, 50), (40, 10)])
def test_after_the_end_the_view_is_gone_and_the_table_stays(
    tmp_path: Path, toy: Path, size: tuple[int, int]
) -> None:
    terminal = FakeTerminal(*size)
    seen: list[str] = []
    code = on_a_terminal(tmp_path, toy, terminal, lambda _: seen.extend(terminal.text))
    assert code == 0
    assert any("▸ sft" in line and ("running" in line) == (size[0] > 40) for line in seen)
    text = terminal.text
    assert not any("▸" in line or "✓" in line for line in text)
    whole = "".join(text)
    assert "stage" in whole
    assert whole.index("data") < whole.index("sft ")
    assert terminal.text[-1] != ""


def test_ctrl_c(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    behave(monkeypatch, sft="sleep")
    terminal = FakeTerminal(200, 24)
    pressed: list[int] = []

    def watch(handle: int) -> None:
        if not pressed and "asleep" in "".join(terminal.text):
            os.write(handle, b"\x03")
            pressed.append(1)

    assert on_a_terminal(tmp_path, toy, terminal, watch) == 6
    text = terminal.text
    place = next(n for n, line in enumerate(text) if "stopping; progress is kept" in line)
    assert any(line.split()[:3] == ["■", "sft", "stopped"] for line in text[place:])
    assert text[-3].startswith("scmini: stopped by SIGINT; 2 of 6 tasks are finished")
    assert text[-1] == f"to go on: scmini run all -o {toy} --until sft"


@pytest.mark.parametrize("terminal", ["dumb", ""])
def test_a_terminal_that_cannot_redraw_gets_lines(tmp_path: Path, toy: Path, terminal: str) -> None:
    plain = FakeTerminal(200, 24)
    assert on_a_terminal(tmp_path, toy, plain, lambda _: None, TERM=terminal) == 0
    assert "\x1b" not in plain.written()
    assert "sft: starts" in plain.text
    assert any(line.startswith("stage 2 of 3 done") for line in plain.text)


def test_no_colours_and_no_unicode(tmp_path: Path, toy: Path) -> None:
    terminal = FakeTerminal(80, 24)
    seen: list[str] = []
    settings = {"NO_COLOR": "1", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    code = on_a_terminal(tmp_path, toy, terminal, lambda _: seen.extend(terminal.text), **settings)
    assert code == 0
    assert terminal.written().isascii()
    assert "\x1b[3" not in terminal.written()
    assert any(line.startswith("  > sft") for line in seen)
