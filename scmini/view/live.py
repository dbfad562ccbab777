"""The view of a whole run: every stage with its state, and the task that runs.

On a terminal the view stands below what scrolls by; in a pipe a line says how far the run is
whenever a stage ends.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmini.console import about, clean, duration
from scmini.display import Display
from scmini.errors import Interrupted, StageFailed
from scmini.screen import Line
from scmini.stage_graph import Task
from scmini.view.gauges import Gauges
from scmini.view.running import CURVES, Curve, ProgressFile, Running, task_lines

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {
    **{"done": "green", "kept": "dim", "running": "cyan", "waiting": "dim"},
    **{"failed": "red", "stopped": "yellow"},
}


@dataclass
class Row:
    """A stage, with all of its methods."""

    stage: str
    tasks: list[Task]
    kept: int = 0
    made: int = 0
    seconds: float = 0.0
    """What the finished tasks took, now or earlier."""
    ended: str = ""
    """"failed" or "stopped", if it ended so."""

    @property
    def is_done(self) -> bool:
        """Whether all of it is finished."""
        return self.kept + self.made == len(self.tasks)

    def state(self, current: Task | None) -> str:
        """done, kept (from before), running, waiting, failed or stopped."""
        if self.ended:
            return self.ended
        if self.is_done:
            return "done" if self.made else "kept"
        return "running" if current in self.tasks else "waiting"


@dataclass
class _Example:
    label: str
    lines: list[Line] = field(default_factory=list)


class RunDisplay(Display):
    """The view of a run.

    Args:
        title: name of the configuration.
        run_dir: the run folder; what runs is told in it to other terminals.
        tasks: what this run will do or has done, in order.

    Attributes:
        expected: seconds of tasks, as far as they are known; may be changed at any time.
    """

    def __init__(
        self,
        title: str,
        run_dir: Path,
        tasks: Sequence[Task],
        *,
        live: bool | None = None,
        console: "Console | None" = None,
    ) -> None:
        super().__init__(live, console)
        self.title, self.run_dir = title, run_dir
        self.rows: dict[str, Row] = {}
        for task in tasks:
            self.rows.setdefault(task.phase, Row(task.phase, [])).tasks.append(task)
        self.expected: Mapping[Task, float] = {}
        self._finished: set[Task] = set()
        self._current: Task | None = None
        self._pid: int | None = None
        self._began = self._task_began = time.monotonic()
        self._curves: dict[str, Curve] = {}
        self._phase: tuple[int, str] = (0, "")
        self._example: _Example | None = None
        self._gauges = Gauges()
        self._file = ProgressFile(run_dir)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._file.remove()
        self._gauges.close()
        super().__exit__(kind, error, trace)

    def stays(self, error: BaseException | None) -> bool:
        """Where it stopped stays in sight."""
        return isinstance(error, StageFailed | Interrupted)

    def kept(self, task: Task, seconds: float) -> None:
        """A task was finished before."""
        self._count(task, seconds).kept += 1

    def prepare(self, task: Task) -> None:
        """The process that will begin with this task starts."""
        self._current, self._task_began = task, time.monotonic()
        self.refresh(at_once=True)

    def begin(self, task: Task) -> None:
        """A task begins in a process."""
        if task != self._current:
            self._current, self._task_began = task, time.monotonic()
        self._curves, self._phase, self._example = {}, (0, ""), None
        self._gauges.new_task()
        self.start(task.label)

    def done(self, task: Task, seconds: float, text: str) -> None:
        """A task ended well; `text` says how."""
        self._count(task, seconds).made += 1
        self._end(task, text)

    def ended(self, task: Task, how: str) -> None:
        """A task ended before its time: it "failed" or was "stopped"."""
        self.rows[task.phase].ended = how
        self._end(task, how)

    def stage_ended(self, phase: str) -> None:
        """All of a stage is finished, something of it just now."""
        if self.screen is None:
            stages = list(self.rows)
            number, whole = stages.index(phase) + 1, self.whole()
            rest = f", {whole}" if whole else ""
            self.line(f"stage {number} of {len(stages)} done{rest}")

    def tick(self, pid: int | None) -> None:
        """Call it twice a second or so while the process `pid` works."""
        self._pid = pid
        self.refresh()
        if (now := self.running()) is not None:
            self._file.write(now)

    def progress(self, label: str, event: Mapping[str, Any]) -> None:
        """A progress event of the running task."""
        if (phase := (int(event["total"]), str(event["unit"]))) != self._phase:
            self._curves, self._phase = {}, phase
        for name in CURVES:
            if isinstance(value := event["figures"].get(name), int | float):
                self._curves.setdefault(name, Curve()).add(float(value))
        super().progress(label, event)

    def example(self, label: str, event: Mapping[str, Any]) -> None:
        """An example event; part of the view where there is room for it."""
        if self.screen is None:
            super().example(label, event)
            return
        self._example = _Example(label, self.example_lines(label, event))
        if len(self._view()) + len(self._example.lines) + 1 >= self.screen.console.height:
            self._example = None
            super().example(label, event)
        self.refresh(at_once=True)

    def finish(self, label: str, text: str) -> None:
        """A task ended. On a terminal its row says so."""
        self.meters.pop(label, None)
        if self.screen is None:
            self.line(f"{label}: {text}")
        self.refresh(at_once=True)

    def view(self) -> list[Line]:
        """Heading, stages, the running task, and the last example."""
        return self._view() + ([(), *self._example.lines] if self._example else [])

    def _view(self) -> list[Line]:
        assert self.screen is not None
        width, height = self.screen.console.size
        now = self.running()
        lower = task_lines(now, width, self.glyphs) if now else []
        lower = [(), *lower] if lower else []
        rows = list(self.rows.values())
        spare = height - 2 - len(lower) - len(rows)  # one line for the heading, one for the cursor
        body, hidden = self._folded(rows, height - 2 - len(lower)) if spare < 0 else (rows, "")
        lines = [self._heading(width)]
        if spare > 0:
            lines.append(())
        lines += [self._row(row, width) for row in body]
        if hidden:
            lines.append(((f"    {hidden}", "dim"),))
        return lines + (lower[1:] if spare < 2 else lower)

    def _heading(self, width: int) -> Line:
        left = f" {clean(self.title)}  {clean(str(self.run_dir))}"
        so_far = f"{duration(time.monotonic() - self._began)} so far"
        right = ", ".join(filter(None, (so_far if width >= 60 else "", self.whole())))
        room = max(1, width - 3 - len(right))
        if len(left) > room:
            left = f"{left[: max(0, room - 2)]}{self.glyphs.cut} "
        return ((left.ljust(room), "bold"), (f" {right}", ""))

    def _row(self, row: Row, width: int) -> Line:
        state = row.state(self._current)
        style = _STYLES[state]
        total, finished = len(row.tasks), row.kept + row.made
        count = f"{finished} of {total}" if total > 1 else ""
        seconds, note = row.seconds, ""
        if state == "running" and self._current is not None:
            seconds += time.monotonic() - self._task_began
            inner = self._current.stage != row.stage  # of a later round of SPIN
            note = self._current.label if inner else self._current.method or ""
        elif state == "waiting":
            note = self._awaited(row)
        took = duration(seconds) if seconds or finished else ""
        quiet = "dim" if state in ("kept", "waiting") else ""
        parts = [
            (f"  {getattr(self.glyphs, state)} ", style),
            (f"{row.stage:<10}", "bold" if state == "running" else quiet),
        ]
        if width >= 44:
            parts.append((f"{state:<8}", style))
        return (*parts, (f"{count:<9}{took:>8}", quiet), (f"  {note}", "dim" if quiet else ""))

    def _awaited(self, row: Row) -> str:
        left = [self.expected.get(task) for task in row.tasks if task not in self._finished]
        known = [seconds for seconds in left if seconds is not None]
        return about(sum(known)) if known and len(known) == len(left) else ""

    def _folded(self, rows: list[Row], room: int) -> tuple[list[Row], str]:
        """The rows for which there is room, and how many are not shown.

        Finished ones go first, from the top, then waiting ones from the end.
        """
        states = {row.stage: row.state(self._current) for row in rows}
        spare = [row for row in rows if states[row.stage] in ("done", "kept")]
        spare += [row for row in reversed(rows) if states[row.stage] == "waiting"]
        gone = spare[: len(rows) - max(0, room - 1)]
        shown = [row for row in rows if row not in gone]
        done = sum(states[row.stage] in ("done", "kept") for row in gone)
        counts = ((done, "done"), (len(gone) - done, "waiting"))
        return shown, ", ".join(f"{count} more {word}" for count, word in counts if count)

    def running(self) -> Running | None:
        """What is known of the running task now."""
        now = time.monotonic()
        if self._current is None:
            return None
        meter = self.meters.get(self._current.label)
        if meter is None:
            return Running(f"{self._current.label}: starting", now - self._task_began)
        return Running(
            label=self._current.label,
            elapsed=now - self._task_began,
            done=meter.done,
            total=meter.total,
            unit=meter.unit,
            rate=meter.rate(now),
            left=meter.left(now),
            figures=meter.figures,
            curves={name: list(curve.values) for name, curve in self._curves.items()},
            memory=self._gauges.text(self._pid),
            whole=self.whole(),
        )

    def whole(self) -> str:
        """How long the run will take from now on; "" if nothing can be said."""
        known, gaps = 0.0, False
        for row in self.rows.values():
            for task in row.tasks:
                if task in self._finished:
                    continue
                running = task == self._current
                seconds = self._rest_of_current() if running else self.expected.get(task)
                known, gaps = known + (seconds or 0.0), gaps or seconds is None
        if gaps:
            return f"at least {about(known).removeprefix('about ')} left" if known >= 60 else ""
        return f"{about(known)} left" if known else ""

    def _rest_of_current(self) -> float | None:
        """Of what the meter says of this phase, and what is expected of the task, the longer."""
        now = time.monotonic()
        assert self._current is not None
        meter, expected = self.meters.get(self._current.label), self.expected.get(self._current)
        left = [meter.left(now)] if meter else []
        left += [expected - (now - self._task_began)] if expected is not None else []
        known = [seconds for seconds in left if seconds is not None]
        return max(0.0, *known) if known else None

    def _count(self, task: Task, seconds: float) -> Row:
        self._finished.add(task)
        row = self.rows[task.phase]
        row.seconds += seconds
        return row

    def _end(self, task: Task, text: str) -> None:
        self._current = self._pid = self._example = None
        self.finish(task.label, text)
