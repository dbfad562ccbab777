"""A stage's process as its parent sees it: what it says, how it ended, and how it is ended."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from scmini.console import clean
from scmini.errors import Interrupted
from scmini.worker import EVENTS_VARIABLE

TAIL_LINES = 15
_BRIEF_LINES, _WIDTH = 4, 160
_PULSE, _GLANCE, _PATIENCE = 0.5, 0.05, 10.0


def begin(
    command: list[str], output: IO[bytes], variables: Mapping[str, str]
) -> tuple["subprocess.Popen[bytes]", int]:
    """Start the process of a stage, which prints into `output`, with more environment variables.

    Returns:
        The process, and the end of a pipe on which its events come.
    """
    receive, send = os.pipe()
    environment = {**os.environ, **variables, EVENTS_VARIABLE: str(send)}
    # Threads that wait spin for microseconds, then sleep. By default they spin far longer, and
    # one busy neighbour on a core makes a small model five times slower.
    environment.setdefault("GOMP_SPINCOUNT", "10000")
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[send],
            env=environment,
            start_new_session=True,  # Ctrl-C comes to us alone
        )
    except BaseException:
        os.close(receive)
        raise
    finally:
        os.close(send)
    return process, receive


def ending(code: int) -> tuple[str, int]:
    """Message and exit code for a process that ended without saying why."""
    if code == -signal.SIGKILL:
        return (
            "killed (SIGKILL): by somebody, or by the system when memory ran out; progress is kept",
            6,
        )
    if code in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        return f"stopped by {signal.Signals(-code).name}; progress is kept", 6
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}", 1
    return f"ended with exit code {code} without finishing", code or 1


def brief(message: str) -> str:
    """The beginning of a message that nobody wrote for people."""
    lines = message.strip().splitlines()
    shown = [_cut(line) for line in lines[:_BRIEF_LINES]]
    return "\n".join([*shown, "..."] if len(lines) > _BRIEF_LINES else shown)


def tail(content: bytes) -> str:
    """The last lines of a log, shortened to a width that can be read."""
    lines = clean(content.decode(errors="replace").replace("\r", "\n")).splitlines()
    return "\n".join(f"  | {_cut(line)}" for line in lines[-TAIL_LINES:])


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4]} ..."


def lines(fd: int, process: "subprocess.Popen[bytes]") -> Iterator[bytes | None]:
    """Lines from the pipe until the process has no more to say; None where it says nothing."""
    rest = b""
    while True:
        if select.select([fd], [], [], _PULSE)[0]:
            chunk = os.read(fd, 65536)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        elif process.poll() is not None:  # a grandchild may hold the pipe open
            return
        else:
            yield None


class Signals:
    """Signals that came while a run works: the first one raises `Interrupted`, later ones count.

    So nothing disturbs what is put in order after the first; who waits there looks at `is_urgent`.
    """

    def __init__(self) -> None:
        self._seen = 0

    @property
    def is_urgent(self) -> bool:
        """Whether a second one came: end at once."""
        return self._seen > 1

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch SIGINT, SIGTERM and SIGHUP."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._take) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _frame: Any) -> None:
        self._seen += 1
        if self._seen == 1:
            raise Interrupted(f"stopped by {signal.Signals(number).name}")


def stop(process: "subprocess.Popen[bytes]", signals: Signals) -> None:
    """End a process and whatever it started: gently first, at once when it becomes urgent."""
    try:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + _PATIENCE
        while process.poll() is None and not signals.is_urgent and time.monotonic() < end:
            time.sleep(_GLANCE)
    finally:  # the first signal may come here
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
