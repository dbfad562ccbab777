"""`scmini status --watch`: the table of a run again and again, until all of it is done.

On a terminal one table is redrawn in place, with the progress of what runs below it; elsewhere a
block is printed for every change.
"""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from scmini.console import clean, mute
from scmini.screen import Line, Screen, is_live
from scmini.view.running import Running, task_lines

Status = dict[str, Any]
"""What `scmini.run_status.status` returns."""
_AROUND = 4
"""Lines of a screen that are no rows: heading, folded rows, summary, cursor."""


def watch(
    look: Callable[[], Status],
    render: Callable[[Status], str],
    *,
    interval: float = 2.0,
    running: Callable[[], Running | None] = lambda: None,
    live: bool | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Status:
    """Show the status on stdout until every stage is done, Ctrl-C, or nobody reads it any more.

    Args:
        look: takes the status; it is asked every `interval` seconds.
        render: the table of a status, one line for each stage below one line of heading.
        running: what is known of the task that runs.
        live: redraw in place (default: whether stdout is a terminal).

    Returns:
        The last status seen.
    """
    live = is_live(sys.stdout) if live is None else live
    found: Status = {"stages": []}
    view = _Table(running) if live else _Blocks()
    with view, contextlib.suppress(KeyboardInterrupt):
        while True:
            found = look()
            if not view.show(found, render) or is_done(found):
                break
            pause(interval)
    return found


def is_done(found: Status) -> bool:
    """Whether every stage is done."""
    return all(row["state"] == "done" for row in found["stages"])


def summary(found: Status) -> str:
    """One line: how many stages are in which state, and which run now."""
    rows = found["stages"]
    counts = Counter(row["state"] for row in rows)
    states = [f"{counts[state]} {state}" for state in counts if state not in ("done", "running")]
    line = ", ".join([f"{counts['done']} of {len(rows)} done", *states])
    running = [
        " ".join(filter(None, (row["name"], row["method"])))
        for row in rows
        if row["state"] == "running"
    ]
    return f"{line}; running: {', '.join(running)}" if running else line


class _Blocks:
    """For a pipe or a file: a block of lines for each change."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> "_Blocks":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, found: Status, render: Callable[[Status], str]) -> bool:
        """Print the status if it changed; False when nobody reads it any more."""
        block = f"{render(found)}\n{summary(found)}"
        if block == self._last:
            return True
        try:
            print(f"\n{block}" if self._last else block, flush=True)
        except BrokenPipeError:
            mute(sys.stdout)
            return False
        self._last = block
        return True


class _Table:
    """For a terminal: one table, redrawn in place, that never outgrows the screen."""

    def __init__(self, running: Callable[[], Running | None]) -> None:
        from rich.console import Console

        self._screen = Screen(Console())
        self._running = running
        self._whole = ""

    def __enter__(self) -> "_Table":
        return self

    def __exit__(self, *_: object) -> None:
        """The whole table, as it was last, stays on the screen."""
        self._screen.close(keep=False)
        if self._whole:
            print(self._whole, flush=True)

    def show(self, found: Status, render: Callable[[Status], str]) -> bool:
        """Redraw; a terminal is always read."""
        self._whole = clean(f"{render(found)}\n{summary(found)}")
        width, height = self._screen.console.size
        now = self._running()
        below: list[Line] = [(), *task_lines(now, width, self._screen.glyphs)] if now else []
        if now and now.whole:
            below.append(((f"  the whole run: {now.whole}", ""),))
        if len(below) + _AROUND >= height:
            below = []
        shown = fitting(found, render, height - len(below))
        self._screen.draw([*(((clean(line), ""),) for line in shown), *below])
        return True


def fitting(found: Status, render: Callable[[Status], str], height: int) -> list[str]:
    """The table and its summary in at most `height` lines.

    Rows that are done are folded first, those at the top before the others, then the rows at the
    end that have not begun; so what runs or failed stays in sight.
    """
    head, *lines = render(found).split("\n")
    states = [row["state"] for row in found["stages"]]
    room = max(1, height - _AROUND)
    rows = list(zip(states, lines, strict=True))
    kept = list(rows)
    spare = [row for row in rows if row[0] == "done"]
    spare += [row for row in reversed(rows) if row[0] in ("stale", "missing")]
    for row in spare[: max(0, len(rows) - room)]:
        kept.remove(row)
    hidden = len(rows) - len(kept)
    more = [f"... and {hidden} that are done or wait"] if hidden else []
    return [head, *(line for _, line in kept[:room]), *more, summary(found)]
