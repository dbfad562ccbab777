"""The task that runs: what is known of it, how it is drawn, and how a second terminal learns of it.

The parent of a run writes what it shows into the run folder once a second; `scmini status --watch`
reads it there. The file means nothing unless the lock of the run folder is held: whoever was killed
left it behind, and the next run takes it away.
"""

import contextlib
import json
import math
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from scmini.console import clean, duration
from scmini.display import bar, count_text, figure_texts, rate_text
from scmini.locks import is_locked
from scmini.screen import Glyphs, Line

PROGRESS = ".progress.json"
CURVES = ("loss", "margin")
"""Figures that are drawn over time."""
_WRITE_SECONDS = 1.0
_FRESH_SECONDS = 60.0
_MOST_BYTES = 1 << 16
_MOST_VALUES = 128
_SPARK_WIDTH = 21


@dataclass(frozen=True)
class Running:
    """What is known of the task that runs. Times in seconds."""

    label: str
    elapsed: float
    done: int = 0
    total: int = 0
    unit: str = ""
    rate: float | None = None
    left: float | None = None
    figures: Mapping[str, float | str] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Name of a figure -> its values so far, thinned out."""
    memory: str = ""
    whole: str = ""
    """How long the whole run will take, if that can be known."""


class Curve:
    """The values of a figure over time, thinned out by means of neighbours when there are many."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._each = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Take in the next value; what is not finite is left out."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) < self._each:
            return
        self.values.append(sum(self._open) / len(self._open))
        self._open = []
        if len(self.values) >= _MOST_VALUES:
            pairs = zip(self.values[::2], self.values[1::2], strict=True)
            self.values = [(one + two) / 2 for one, two in pairs]
            self._each *= 2


def sparkline(values: Sequence[float], width: int, signs: str) -> str:
    """Values as one row of at most `width` signs, of which `signs` has the lowest first."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    count = min(width, len(finite))
    edges = [len(finite) * number // count for number in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low
    if not 0 < span < math.inf:
        return signs[0] * count
    top = len(signs) - 1
    return "".join(signs[min(top, int((mean - low) / span * len(signs)))] for mean in means)


def task_lines(now: Running, width: int, glyphs: Glyphs) -> list[Line]:
    """The running task in at most four lines: name, bar, curves, memory."""
    lines: list[Line] = [(("  ", ""), (clean(now.label), "bold"), *_since(now))]
    if now.total:
        share = now.done / now.total
        parts = [f"{100 * now.done // now.total:3d} %", count_text(now.done, now.total, now.unit)]
        if now.left is not None and now.done < now.total:
            parts.append(f"{duration(now.left)} left")
        if now.rate is not None:
            parts.append(rate_text(now.rate, now.unit))
        text = f" {parts[0]}  {'  '.join(parts[1:])}"
        drawn = bar(share, 24 if width >= max(80, 27 + len(text)) else 12, glyphs)
        lines.append((("  ", ""), *drawn, (text, "")))
    curves = _curves(now, width, glyphs)
    if curves:
        lines.append((("  ", ""), *curves))
    others = {k: v for k, v in now.figures.items() if not curves or k not in now.curves}
    if text := "  ".join(filter(None, (*figure_texts(others), now.memory))):
        lines.append(((f"  {clean(text)}", "dim"),))
    return lines


def _since(now: Running) -> Line:
    return ((f"  {duration(now.elapsed)}", "dim"),) if now.elapsed >= 1 else ()


def _curves(now: Running, width: int, glyphs: Glyphs) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    room = _SPARK_WIDTH if width >= 80 else max(2, width // 2 - 19)
    for name in CURVES:
        value = now.figures.get(name)
        if isinstance(value, float) and name in now.curves:
            spark = sparkline(now.curves[name], room, glyphs.sparks)
            parts += [(f"{name} {value:<8.3g} ", ""), (f"{spark:<{room}}", "cyan"), ("  ", "")]
    return parts


class ProgressFile:
    """The file by which a second terminal learns what runs. Faults of writing are passed over."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / PROGRESS
        self._torn = run_dir / f"{PROGRESS}.tmp"
        self._written = -math.inf
        self.remove()

    def write(self, now: Running) -> None:
        """Put it down, at most once a second."""
        if time.monotonic() - self._written < _WRITE_SECONDS:
            return
        self._written = time.monotonic()
        with contextlib.suppress(OSError):
            self._torn.write_text(json.dumps(asdict(now)), encoding="utf-8")
            os.replace(self._torn, self._path)

    def remove(self) -> None:
        """Take it away, as nothing runs."""
        for path in (self._torn, self._path):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def read_progress(run_dir: Path) -> Running | None:
    """What runs in a run folder now; None if nothing does, or it cannot be known."""
    path = run_dir / PROGRESS
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > _MOST_BYTES:
            return None
        if time.time() - about.st_mtime > _FRESH_SECONDS or not is_locked(run_dir / ".lock"):
            return None
        return _checked(json.loads(path.read_bytes()))
    except (OSError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError):
        return None  # not ours, or torn
    except RecursionError:
        return None


def _checked(found: dict[str, Any]) -> Running:
    """What the file says, each value as what it should be."""
    return Running(
        label=str(found["label"]),
        elapsed=_number(found["elapsed"]),
        done=max(0, int(_number(found["done"]))),
        total=max(0, int(_number(found["total"]))),
        unit=str(found["unit"]),
        rate=None if found["rate"] is None else _number(found["rate"]),
        left=None if found["left"] is None else _number(found["left"]),
        figures={k: v if isinstance(v, str) else float(v) for k, v in found["figures"].items()},
        curves={k: [float(v) for v in values] for k, values in found["curves"].items()},
        memory=str(found["memory"]),
        whole=str(found["whole"]),
    )


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number
