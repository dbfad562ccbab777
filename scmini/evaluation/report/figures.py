"""The pictures of the report, drawn with matplotlib, the same bytes for the same numbers.

Every function takes plain numbers and returns a picture; nothing here reads a run. Colours are
those of Okabe and Ito, which colour-blind readers can tell apart; markers and dashes say it again.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from scmini.config import spin_iterations
from scmini.evaluation.report.folded_axis import fold

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6b6b6b",
)  # fmt: skip
_LINES: dict[str, tuple[str, Any]] = {
    "sft": (ORANGE, (0, (5, 2))),
    "sft-continued": (PURPLE, (0, (1, 1.3))),
    "dpo": (GREEN, (0, (5, 1.5, 1, 1.5))),
    "targets": ("#222222", (0, (3, 1))),
}
_BESIDE = 1.13
"""Factor between neighbours at the same k."""
_OURS = re.compile(r"self-contrast-(?P<k>\d+)(?P<unfiltered>-unfiltered)?")

Rows = Mapping[str, Mapping[str, Any]]
"""Method -> numbers by name, each with its interval under the name with "_ci95" (None: unknown)."""
Value = tuple[float, float, float]
"""A number with the bounds of its interval."""


@dataclass(frozen=True)
class Panel:
    """One quantity of the rows: its key, the factor to what is drawn, and the axis label."""

    key: str
    scale: float
    label: str


def panels(reward_scale: float) -> list[Panel]:
    """The two panels: win rate against the target, mean reward (times `reward_scale`)."""
    unit = " (0 to 100)" if reward_scale == 100 else ""
    return [
        Panel("win_rate", 1.0, "Win rate against the target (%)"),
        Panel("mean_reward", reward_scale, f"Mean reward{unit}"),
    ]


LENGTH = Panel("mean_length", 1.0, "Mean length (characters)")
"""What is drawn where nobody graded the answers."""


def win_rate_figure(rows: Rows, reward_scale: float) -> Figure:
    """Win rate and mean reward with one legend: what README and win_rate.png show."""
    return panels_figure(rows, panels(reward_scale))


def panels_figure(rows: Rows, shown: Sequence[Panel]) -> Figure:
    """One panel alone, or several in two columns with one legend; at least one."""
    columns = min(2, len(shown))
    lines = math.ceil(len(shown) / columns)
    with style():
        size = (8.4, 3.65 * lines + 0.85) if columns == 2 else (4.4, 4.4)  # a phone's width
        figure = Figure(figsize=size, layout="constrained")
        every = figure.subplots(lines, columns, squeeze=False).flat
        legend: dict[str, Any] = {}
        for axes, panel in zip(every, shown, strict=False):
            _draw_panel(axes, rows, panel)
            handles, labels = axes.get_legend_handles_labels()
            legend |= {
                label: legend.get(label, h) for h, label in zip(handles, labels, strict=True)
            }
        for axes in figure.axes[len(shown) :]:
            axes.set_axis_off()
        figure.legend(
            legend.values(), legend.keys(), loc="outside lower center",
            ncols=columns + 1, fontsize=9.5 if columns == 2 else 8.5, frameon=False,
        )  # fmt: skip
    return figure


def curve_figure(
    method: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    limits: Mapping[str, tuple[float, float]],
) -> Figure:
    """Training curves of one method, one small plot above another.

    Args:
        method: the title.
        curves: name of the quantity -> (step, value) points in order.
        limits: range of the y axis by name, so that pictures of several methods compare.
    """
    with style():
        figure = Figure(figsize=(2.4, 0.6 + 1.25 * len(curves)), layout="constrained")
        figure.suptitle(method, fontsize=9.5, fontweight="bold")
        stacked = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, points), colour in zip(
            stacked, curves.items(), (BLUE, RED, GREEN, PURPLE), strict=False
        ):
            steps, values = zip(*points, strict=True)
            marker = "." if len(steps) < 3 else ""
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker)
            axes.set_ylabel(name)
            if name in limits:
                axes.set_ylim(*_padded(*limits[name]))
            axes.yaxis.set_major_locator(MaxNLocator(4))
        stacked[-1].xaxis.set_major_locator(MaxNLocator(4, integer=True))
        stacked[-1].set_xlabel("step")
        figure.align_ylabels()
    return figure


def similarity_figure(
    edges: Sequence[float],
    kinds: Mapping[str, Sequence[int]],
    cut: tuple[float, float, float] | None,
    window: Sequence[tuple[str, float]],
) -> Figure:
    """How similar to the target the answers are, one kind of answer on top of another.

    Args:
        edges: of the intervals, one more than there are numbers of a kind.
        kinds: name -> answers in each interval; drawn from the bottom up, three at most.
        cut: 10 %, 50 % and 90 % quantile over prompts of where the too similar begin.
        window: fixed limits: name and similarity.
    """
    with style():
        figure = Figure(figsize=(4.4, 4.0), layout="constrained")
        axes = figure.subplots()
        bottom = np.zeros(len(edges) - 1)
        for (name, counts), colour in zip(
            kinds.items(), (BLUE, "#9cc9e3", "#d4d4d4"), strict=False
        ):
            label = f"{name} ({sum(counts):,})"
            top = bottom + np.asarray(counts)
            patch = axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, zorder=2)
            patch.set_label(label)
            bottom = top
        if cut is not None:
            low, middle, high = cut
            axes.axvspan(low, high, color=RED, alpha=0.12, linewidth=0, zorder=1)
            label = f"cut: {middle:.2f} in the median prompt, {low:.2f} to {high:.2f} in 80 %"
            axes.axvline(middle, color=RED, linewidth=1.5, linestyle=(0, (5, 2)), label=label)
        for (name, value), dashes in zip(window, ((0, (1, 1)), (0, (3, 1, 1, 1))), strict=False):
            label = f"{name}: {value:g}"
            axes.axvline(value, color="#222222", linewidth=1.3, linestyle=dashes, label=label)
        filled = np.flatnonzero(bottom)
        if len(filled):
            first, last = edges[filled[0]], edges[filled[-1] + 1]
            axes.set_xlim(min(0.0, first), max(first + 0.2, last))
        axes.set_xlabel("cosine similarity to the target")
        axes.set_ylabel("sampled answers")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.legend(loc="outside lower center", frameon=False, fontsize=8.5)
    return figure


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as SVG text, without date; `salt` keeps ids of pictures on one page apart."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib ends some lines with a blank
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, 1680 pixels wide for the two panels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def style() -> AbstractContextManager[None]:
    """How all figures of the project look."""
    return mpl.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "axes.edgecolor": "#555555",
            "xtick.color": "#333333",
            "ytick.color": "#333333",
        }
    )


def _draw_panel(axes: Axes, rows: Rows, panel: Panel) -> None:
    values = {name: v for name, row in rows.items() if (v := _value(row, panel)) is not None}
    ours, unfiltered = _series(values, filtered=True), _series(values, filtered=False)
    spin = sorted((n, name) for name in values if (n := spin_iterations(name)))
    for name, (colour, dashes) in _LINES.items():
        if name in values:
            middle, low, high = values[name]
            axes.axhline(middle, color=colour, linestyle=dashes, linewidth=1.5, label=name)
            if high > low:
                axes.axhspan(low, high, color=colour, alpha=0.10, linewidth=0)
    if ours:
        numbers = np.asarray([values[name] for _, name in ours])
        axes.fill_between(
            [k for k, _ in ours], numbers[:, 1], numbers[:, 2], color=BLUE, alpha=0.13, linewidth=0
        )
        _bars(axes, ours, values, label="self-contrast-k", color=BLUE, marker="o", linestyle="-")
    if unfiltered:
        style = {"color": RED, "marker": "s", "linestyle": "", "markerfacecolor": "white"}
        shifted = [(k * _BESIDE, name) for k, name in unfiltered]
        _bars(axes, shifted, values, label="self-contrast-k, unfiltered", **style)
    if spin:
        _draw_spin(axes, spin, values)
    ticks = {k for k, _ in [*ours, *unfiltered]} | ({1.0} if spin or not ours else set())
    _axis(axes, panel, sorted(ticks), room=_BESIDE ** len(spin))
    low, high = axes.get_ylim()
    _off_scale(axes, values)
    fold(axes, [(a, b) for m, a, b in values.values() if low <= m <= high])


def _value(row: Mapping[str, Any], panel: Panel) -> Value | None:
    """What a panel shows of a row; without an interval the number alone."""
    middle = row.get(panel.key)
    if middle is None:
        return None
    low, high = row.get(f"{panel.key}_ci95") or (middle, middle)
    return panel.scale * middle, panel.scale * low, panel.scale * high


def _draw_spin(axes: Axes, spin: Sequence[tuple[int, str]], values: Mapping[str, Value]) -> None:
    """All have one negative at a time: they stand left of k = 1, the first iteration outermost."""
    count = len(spin)
    places = [(_BESIDE ** (n - count), name) for n, (_, name) in enumerate(spin)]
    several = spin[-1][0] > 1
    style = {"color": SKY, "marker": "D", "markerfacecolor": "white", "linestyle": (0, (1, 1))}
    label = "spin, by iteration" if several else "spin"
    _bars(axes, places, values, label=label, **style, **({"markersize": 9} if several else {}))
    for (iteration, name), (x, _) in zip(spin, places, strict=True):
        if several:
            axes.annotate(
                str(iteration), (x, values[name][0]), ha="center", va="center_baseline",
                fontsize=7, color="#333333", zorder=4,
            )  # fmt: skip


def _series(names: Iterable[str], *, filtered: bool) -> list[tuple[float, str]]:
    """(k, method) of the self-contrast methods, with or without the similarity cut, by k."""
    found = [(name, _OURS.fullmatch(name)) for name in names]
    return sorted(
        (float(match["k"]), name)
        for name, match in found
        if match and bool(match["unfiltered"]) != filtered
    )


def _bars(
    axes: Axes, series: Sequence[tuple[float, str]], values: Mapping[str, Value], **style: Any
) -> None:
    numbers = [values[name] for _, name in series]
    axes.errorbar(
        [k for k, _ in series],
        [middle for middle, _, _ in numbers],
        yerr=[[m - low for m, low, _ in numbers], [high - m for m, _, high in numbers]],
        capsize=3,
        linewidth=1.8,
        elinewidth=1.3,
        zorder=3,
        **{"markersize": 6, **style},
    )


def _axis(axes: Axes, panel: Panel, ticks: Sequence[float], room: float) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlim(min(ticks) / (1.25 * room), max(ticks) * 1.35)
    axes.set_xlabel("Number of negatives k")
    title = "\n".join(textwrap.wrap(panel.label, 50))
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.grid(axis="x", visible=False)


def _off_scale(axes: Axes, values: Mapping[str, Value]) -> None:
    """Other temperatures as arrows at the edge: drawn to scale they would flatten all the rest."""
    low, high = axes.get_ylim()
    for name, (middle, _, _) in values.items():
        if not name.startswith("sft-temperature-"):
            continue
        text = f"sft at T = {name.rsplit('-', 1)[1]}: {middle:.1f}"
        if not low <= middle <= high:
            text += " ↑" if middle > high else " ↓"
            edge = 0.99 if middle > high else 0.02
            axes.text(
                0.02, edge, text, transform=axes.transAxes, fontsize=8.5, color=GREY,
                va="top" if middle > high else "bottom",
            )  # fmt: skip
            # room for the words above (below) whatever is drawn there
            room = 0.09 * (high - low)
            low, high = (low, high + room) if middle > high else (low - room, high)
        else:
            axes.axhline(middle, color=GREY, linewidth=1, linestyle=(0, (2, 2)), label=text)
    axes.set_ylim(low, high)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.5 * math.fabs(high) or 0.5
    return low - room, high + room
