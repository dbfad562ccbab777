"""What the parent shows of the events of its tasks, on stderr: a live view, or plain lines."""

import math
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from scmini.console import clean, duration, labelled, listen, to_stderr
from scmini.screen import ASCII, Glyphs, Line, Screen, is_live

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_SECONDS = 10.0
REDRAW_SECONDS = 0.5
BAR_WIDTH = 20
_SPECIAL = re.compile("(⟦[^⟦⟧]*⟧)")


@dataclass
class Meter:
    """Progress of one task: rate and time left are measured from the first event of a phase."""

    started: float
    first_done: int = 0
    done: int = 0
    total: int = 0
    unit: str = ""
    figures: dict[str, float | str] = field(default_factory=dict)
    printed: float = 0.0

    def update(self, event: Mapping[str, Any], now: float) -> bool:
        """Take in a progress event; True when it begins or ends a phase."""
        done, total, unit = int(event["done"]), int(event["total"]), str(event["unit"])
        fresh = (total, unit) != (self.total, self.unit) or done < self.done
        if fresh:
            self.started, self.first_done = now, done
        self.done, self.total, self.unit = done, total, unit
        self.figures = dict(event["figures"])
        return fresh or done >= total

    def rate(self, now: float) -> float | None:
        """Units in a second; None before the first unit is done."""
        seconds, finished = now - self.started, self.done - self.first_done
        return finished / seconds if finished > 0 and seconds > 0 else None

    def left(self, now: float) -> float | None:
        """Seconds to the end of the phase, if they can be known."""
        rate = self.rate(now)
        return max(0, self.total - self.done) / rate if rate else None

    def text(self, now: float) -> str:
        """All of it in a line."""
        share = f" ({100 * self.done // self.total} %)" if self.total else ""
        parts = [f"{count_text(self.done, self.total, self.unit)}{share}"]
        if rate := self.rate(now):
            parts.append(rate_text(rate, self.unit))
            if self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return clean(", ".join([*parts, *figure_texts(self.figures)]))


def count_text(done: int, total: int, unit: str) -> str:
    """122/200 steps."""
    return f"{done}/{total}{f' {unit}' if unit else ''}"


def rate_text(rate: float, unit: str) -> str:
    """0.42 steps/s."""
    return f"{f'{rate:.3g}' if rate < 1000 else f'{rate:.0f}'} {unit or 'units'}/s"


def figure_texts(figures: Mapping[str, float | str]) -> list[str]:
    """Figures with their names, four digits each."""
    return [f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in figures.items()]


def bar(share: float, width: int, glyphs: Glyphs) -> Line:
    """A bar of `width` cells, `share` of it full."""
    if not math.isfinite(share):
        share = 0.0
    full = int(min(max(share, 0.0), 1.0) * width)
    return ((glyphs.full * full, "cyan"), (glyphs.rest * (width - full), "dim"))


class Display:
    """The parent's view of the events of its tasks; a context manager.

    On a terminal a line with a bar for each task that runs, redrawn at most twice a second;
    otherwise plain lines, at most one in 10 s for each task and always the first and the last.

    Args:
        live: draw on a terminal (default: whether stderr is one that can be drawn on).
        console: the terminal, if not stderr.
    """

    def __init__(self, live: bool | None = None, console: "Console | None" = None) -> None:
        self.live = is_live(sys.stderr) if live is None else live
        self.meters: dict[str, Meter] = {}
        self.screen: Screen | None = None
        self._console = console
        self._drawn = 0.0

    @property
    def glyphs(self) -> Glyphs:
        """The signs that the terminal can show."""
        return self.screen.glyphs if self.screen else ASCII

    def __enter__(self) -> Self:
        if self.live:
            from rich.console import Console

            self.screen = Screen(self._console or Console(stderr=True))
        listen(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        listen(None)
        if self.screen is not None:
            self.screen.close(keep=self.stays(error))
            self.screen = None

    def stays(self, error: BaseException | None) -> bool:
        """Whether the last view stays on the screen after the end."""
        return False

    def view(self) -> list[Line]:
        """What is to be seen now: a line for each task."""
        now = time.monotonic()
        lines = []
        for label, meter in self.meters.items():
            share = meter.done / meter.total if meter.total else 0.0
            drawn = bar(share, BAR_WIDTH, self.glyphs)
            text = f" {meter.text(now)}" if meter.total else ""
            lines.append((("", ""), (f"{clean(label)} ", ""), *drawn, (text, "")))
        return lines

    def refresh(self, *, at_once: bool = False) -> None:
        """Redraw, if half a second went by or `at_once`."""
        now = time.monotonic()
        if self.screen is not None and (at_once or now - self._drawn >= REDRAW_SECONDS):
            self._drawn = now
            self.screen.draw(self.view())

    def line(self, text: str) -> None:
        """A line of text above the live view, or simply the next line."""
        if self.screen is None:
            to_stderr(text)
            return
        from rich.text import Text

        shown = Text(clean(text))
        shown.highlight_regex(r"\A(?:[^:\n]{1,60}: )?(?P<yellow>warning:)")
        self.screen.above(shown)

    def example(self, label: str, event: Mapping[str, Any]) -> None:
        """An example event of a task."""
        if self.screen is None:
            self.line(f"{label}: {event['text']}" if label else event["text"])
            return
        from rich.text import Text

        lines = self.example_lines(label, event)
        self.screen.above(Text("\n").join(Text.assemble(*line) for line in lines))

    def example_lines(self, label: str, event: Mapping[str, Any]) -> list[Line]:
        """An example event in colours: the prompt, what is learned, special tokens."""
        lines: list[Line] = [
            ((clean(f"{label}: {event['title']}" if label else event["title"]), ""),)
        ]
        for name, texts in event["rows"]:
            style = "cyan" if name == "prompt" else "green"
            for title, line in labelled([(name, texts)]):
                pieces = _SPECIAL.split(clean(line))  # every second one is a special token
                coloured = [
                    (piece, "magenta" if n % 2 else style) for n, piece in enumerate(pieces)
                ]
                lines.append(((f"  {clean(title):<9} ", "dim"), *coloured))
        return lines

    def start(self, label: str) -> None:
        """A task begins."""
        self.meters[label] = Meter(time.monotonic())
        if self.screen is None:
            self.line(f"{label}: starts")
        self.refresh(at_once=True)

    def finish(self, label: str, text: str) -> None:
        """A task ended; `text` says how. Its bar becomes a line, so that the view never outgrows
        the screen."""
        self.meters.pop(label, None)
        self.line(f"{label}: {text}")
        self.refresh(at_once=True)

    def progress(self, label: str, event: Mapping[str, Any]) -> None:
        """A progress event of a task."""
        now = time.monotonic()
        meter = self.meters.setdefault(label, Meter(now))
        edge = meter.update(event, now)
        if self.screen is None and (edge or now - meter.printed >= PLAIN_SECONDS):
            meter.printed = now
            self.line(f"{label}: {meter.text(now)}")
        self.refresh()
