"""What is shown of a process that ended badly, and its first and second signal."""

import os
import signal

import pytest

from scmini.child_process import TAIL_LINES, Signals, brief, ending, tail
from scmini.errors import Interrupted


def test_the_end_of_a_log_stays_readable() -> None:
    log = b"\n".join([b"\x1b[31mred", *[b"x" * 5000] * 20, "日\xe9".encode() + b"\xff"])
    lines = tail(log).splitlines()
    assert len(lines) == TAIL_LINES
    assert max(map(len, lines)) <= 164
    assert lines[0].endswith(" ...")
    assert lines[-1] == "  | 日é\N{REPLACEMENT CHARACTER}"
    assert tail(b"a\x1b[2Jb\rprogress 1\rprogress 2") == "  | ab\n  | progress 1\n  | progress 2"
    assert tail(b"") == ""


def test_a_message_of_a_library_is_a_few_lines() -> None:
    assert brief("  short\n") == "short"
    lines = brief("\n".join(["x" * 5000] * 50)).splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) == 160
    assert lines[-1] == "..."
    assert brief("") == ""


def test_endings() -> None:
    assert ending(-signal.SIGKILL)[1] == 6
    assert ending(-signal.SIGSEGV) == ("crashed with SIGSEGV", 1)
    assert ending(0)[1] == 1


def test_the_first_signal_interrupts_and_the_second_is_urgent() -> None:
    before = signal.getsignal(signal.SIGINT)
    signals = Signals()
    with signals.caught():
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not signals.is_urgent
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.is_urgent
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGINT) is before
