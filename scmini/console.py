"""What a person sees while stages work. Everything goes to stderr; results belong to stdout.

A stage calls `say`, `warn` and `progress` and need not know where it runs: in a stage's own process
they become JSON events on a pipe (`send_events_to`), in the parent a `scmini.display.Display` turns
the events into a live view on a terminal, or into plain lines elsewhere.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Protocol

from scmini.quoting import redact

EVENT_SECONDS = 0.2
EXAMPLE_LINES, EXAMPLE_WIDTH = 12, 100
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)

_events_fd: int | None = None
_last_event = 0.0


class Listener(Protocol):
    """Who shows what this process says."""

    def line(self, text: str) -> None: ...

    def example(self, label: str, event: Mapping[str, Any]) -> None: ...


_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """From now on, what this process says goes to `listener`; None: to stderr."""
    global _listener
    _listener = listener


def to_stderr(text: str) -> None:
    """Print to stderr. Work goes on when nobody reads it any more (`2>&1 | head`)."""
    try:
        print(clean(text), file=sys.stderr, flush=True)
    except OSError:
        mute(sys.stderr)


def mute(stream: IO[str]) -> None:
    """Let what a stream still has to say go nowhere: a failure at exit would change the code."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def clean(text: str) -> str:
    """Text of models and files without escape sequences, control characters and keys."""
    return redact(_CONTROL.sub("", text))


def send_events_to(fd: int) -> None:
    """From now on, this process's messages and progress are events on the pipe `fd`."""
    global _events_fd
    os.set_inheritable(fd, False)
    _events_fd = fd


def emit(event: Mapping[str, Any]) -> None:
    """Send one event to the parent (one line of JSON); without a parent nothing happens."""
    if _events_fd is None:
        return
    data = json.dumps(event).encode() + b"\n"
    try:
        while data:
            data = data[os.write(_events_fd, data) :]
    except BrokenPipeError:
        pass  # the parent is gone, and this process soon will be


def say(text: str) -> None:
    """One line for the person, in passing."""
    _tell("say", text)


def warn(text: str) -> None:
    """One line that should be noticed."""
    _tell("warn", text)


def _tell(kind: str, text: str) -> None:
    if _events_fd is not None:
        emit({"event": kind, "text": text})
    elif _listener is not None:
        _listener.line(text if kind == "say" else f"warning: {text}")
    else:
        to_stderr(text if kind == "say" else f"warning: {text}")


def example(title: str, parts: Sequence[tuple[str, str]]) -> None:
    """Show a text that a stage works on, shortened to `EXAMPLE_LINES` lines.

    Args:
        title: one line.
        parts: what each part of the text is, and the part. "prompt" has a colour of its own, and so
            have special tokens, which stand in ⟦ ⟧.
    """
    rows = _shortened(parts)
    lines = [f"  {label:<9} {line}" for label, line in labelled(rows)]
    event = {"event": "example", "title": title, "rows": rows, "text": "\n".join([title, *lines])}
    if _events_fd is not None:
        emit(event)
    elif _listener is not None:
        _listener.example("", event)
    else:
        to_stderr(str(event["text"]))


def _shortened(parts: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """The parts, with a few lines of each."""
    shown = list(parts)
    if len(parts) > 4:
        shown = [*parts[:2], ("...", f"{len(parts) - 4} more"), *parts[-2:]]
    each = min(6, (EXAMPLE_LINES - 1) // max(1, len(shown)))
    found = []
    for label, text in shown:
        lines = text.split("\n")
        if len(lines) > 1 and not lines[-1]:  # an empty line would not be noticed
            lines = [*lines[:-2], f"{lines[-2]}⏎"]
        if each < 3:
            lines = ["⏎".join(lines)]
        elif len(lines) > each:
            end = (each - 1) // 2
            lines = [*lines[: each - 1 - end], "...", *lines[-end:]]
        found.append((label, [_cut(line) for line in lines]))
    return found


def _cut(line: str) -> str:
    """A line without its middle, if it is long."""
    if len(line) <= EXAMPLE_WIDTH:
        return line
    half = EXAMPLE_WIDTH // 2 - 3
    return f"{line[:half]} ... {line[-half:]}"


def labelled(rows: Sequence[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, str]]:
    """Lines, the first of each part with its label."""
    for label, lines in rows:
        for number, line in enumerate(lines):
            yield (label if number == 0 else ""), line


def progress(done: int, total: int, unit: str = "", **figures: float | str) -> None:
    """How far the stage is. Call it freely: it passes on one call in 0.2 s, and the first and last.

    Args:
        done: units of work that are finished, those of earlier, interrupted runs included.
        total: units there are.
        unit: what is counted, in the plural ("steps", "prompts").
        figures: what to show beside it, such as loss=0.31.
    """
    global _last_event
    now = time.monotonic()
    if _events_fd is None or (now - _last_event < EVENT_SECONDS and 0 < done < total):
        return
    _last_event = now
    shown = {k: v if isinstance(v, str) else float(v) for k, v in figures.items()}
    emit({"event": "progress", "done": done, "total": total, "unit": unit, "figures": shown})


def duration(seconds: float) -> str:
    """Seconds as people write them: 3.2 s, 4:05, 2:10:00."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def about(seconds: float) -> str:
    """Seconds as people guess them: under a minute, about 12 min, about 3.5 h, about 2.1 days."""
    if seconds < 60:
        return "under a minute"
    if seconds < 99.5 * 60:
        return f"about {seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"about {hours:.1f} h" if hours < 48 else f"about {hours / 24:.1f} days"


def size(count: float) -> str:
    """Bytes as people write them: 812 B, 3.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, aligned; the caller prints it."""
    cells = [list(head), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = (
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )
    return "\n".join(lines)
