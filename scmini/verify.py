"""`scmini verify` as seen from the command line: starts the process, collects, draws the table.

Nothing here imports torch; the work is done in scmini.verification, in a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

from scmini.console import clean, duration, table
from scmini.display import Display
from scmini.errors import StageFailed

WORKER = [sys.executable, "-P", "-m", "scmini.verification"]
HEAD = ("check", "implementation", "dtype", "error", "allowed", "result")
LABEL = "verify"
TAIL_LINES = 15
_MODEL_KEY = "model.model_name_or_path"  # what messages about a model name; here it is an option
_COLOURS = {"pass": "green", "fail": "bold red", "skipped": "yellow"}


def verify(device: str | None, model: str | None) -> dict[str, Any]:
    """Prove on this machine that fast equals slow.

    Args:
        device: "cpu", "cuda", or None for CUDA where there is some.
        model: folder or hub name; None takes a tiny random one.

    Returns:
        The document of `scmini verify --json`: {"device", "model", "versions", "checks": [{"name",
        "implementation", "dtype", "error", "allowed", "passed", "message"}], "passed"}. The
        `passed` of a skipped check is None; of the whole, whether none failed.

    Raises:
        StageFailed: the checks could not begin; carries the exit code.
    """
    begin = time.monotonic()
    with tempfile.TemporaryFile() as noise, Display() as display:
        seen = _Seen(display)
        code = _follow(json.dumps({"device": device, "model": model}), seen, noise)
        if code or seen.document is None:
            _end_badly(seen, code, noise)
        display.finish(LABEL, f"ended after {duration(time.monotonic() - begin)}")
    assert seen.document is not None
    return {**seen.document, "passed": all(c["passed"] is not False for c in seen.checks)}


class _Seen:
    """What the events said so far."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.checks: list[dict[str, Any]] = []
        self.document: dict[str, Any] | None = None
        self.current: dict[str, Any] = {}
        self.error: dict[str, Any] | None = None
        display.start(LABEL)

    def take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "begin":
            self.document = {**event, "checks": self.checks}
        elif kind == "start":
            self.current = event
        elif kind == "progress":
            self.display.progress(LABEL, event)
        elif kind == "check":
            self.checks.append(event)
        elif kind == "error":
            self.error = event


def _follow(request: str, seen: _Seen, noise: IO[bytes]) -> int:
    """Run the process and take its events; returns its exit code."""
    environment = {**os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    shown = os.environ.get("SCMINI_TRACEBACK") == "1"
    process = subprocess.Popen(
        [*WORKER, request],
        stdin=subprocess.PIPE,  # it ends when this does
        stdout=subprocess.PIPE,
        stderr=None if shown else noise,
        env=environment,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            seen.take(json.loads(line))
        return process.wait()
    finally:
        process.kill()
        process.wait()


def _end_badly(seen: _Seen, code: int, noise: IO[bytes]) -> None:
    """A process that crashed in a check makes a failed check; one that never began, an error."""
    if seen.error is None and seen.current:
        how = f"{signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        message = f"the process ended with {how}; later checks were not done"
        failed = {"error": None, "allowed": None, "passed": False, "message": message}
        seen.checks.append({**seen.current, **failed})
        return
    error = seen.error or {"message": f"ended with code {code}", "code": 1, "expected": False}
    text = clean(error["message"]).replace(_MODEL_KEY, "--model")
    if not error["expected"]:
        noise.seek(0)
        lines = clean(noise.read().decode(errors="replace")).splitlines()[-TAIL_LINES:]
        text = "\n".join([text, *(f"  | {line}" for line in lines)])
    raise StageFailed(LABEL, error["code"] or 1, text)


def summary(found: dict[str, Any]) -> str:
    """How many checks passed, failed and were skipped."""
    results = [_result(check) for check in found["checks"]]
    counts = [(results.count(word), word) for word in ("pass", "fail", "skipped")]
    words = {"pass": "passed", "fail": "failed", "skipped": "skipped"}
    said = ", ".join(f"{count} {words[word]}" for count, word in counts if count)
    return f"{found['device']}, {found['model']}: {said}"


def plain_text(found: dict[str, Any]) -> str:
    """The table as aligned columns, then what went wrong or was skipped, then the summary."""
    return "\n".join([table(HEAD, _rows(found)), *_notes(found), summary(found)])


def show_on_terminal(found: dict[str, Any]) -> None:
    """The same with colours and rules, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*HEAD)
    for row in _rows(found):
        *cells, result = row
        drawn.add_row(*map(Text, cells), Text(result, style=_COLOURS[result]))
    console = Console()
    console.print(drawn)
    for line in [*_notes(found), summary(found)]:
        console.print(Text(line))


def _rows(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            check["name"],
            check["implementation"],
            check["dtype"],
            _number(check["error"]),
            _number(check["allowed"]),
            _result(check),
        ]
        for check in found["checks"]
    ]


def _notes(found: dict[str, Any]) -> list[str]:
    """One line per message; the same message of many checks is said once."""
    by_message: dict[str, list[str]] = {}
    for check in found["checks"]:
        if check["message"]:
            label = f"{check['name']} ({check['implementation']}, {check['dtype']})"
            by_message.setdefault(clean(check["message"]), []).append(label)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {message}"
        for message, names in by_message.items()
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _result(check: dict[str, Any]) -> str:
    return {True: "pass", False: "fail", None: "skipped"}[check["passed"]]
