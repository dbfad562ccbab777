"""The pictures of the report, drawn with matplotlib, the same bytes for the same numbers.

Every function takes plain numbers and returns a picture; nothing here reads a run. Colours are
those of Okabe and Ito, which colour-blind readers can tell apart; markers and dashes say it again.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6b6b6b",
)  # fmt: skip
_LINES: dict[str, tuple[str, Any]] = {
    "sft": (ORANGE, (0, (5, 2))),
    "sft-continued": (PURPLE, (0, (1, 1.3))),
    "dpo": (GREEN, (0, (5, 1.5, 1, 1.5))),
    "targets": ("#222222", (0, (3, 1))),
}
_OURS = re.compile(r"self-contrast-(?P<k>\d+)(?P<unfiltered>-unfiltered)?")

Rows = Mapping[str, Mapping[str, Any]]
"""Method -> its row of results.json (win_rate, win_rate_ci95, mean_reward, mean_reward_ci95)."""


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


def win_rate_figure(rows: Rows, reward_scale: float, title: str = "") -> Figure:
    """Both panels side by side with one legend: what README and win_rate.png show."""
    with style():
        figure = Figure(figsize=(8.4, 4.5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, 2), panels(reward_scale), strict=True):
            _draw_panel(axes, rows, panel)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        if title:
            figure.suptitle(title, fontsize=11)
    return figure


def panel_figure(rows: Rows, panel: Panel) -> Figure:
    """One panel alone: narrow enough for a phone."""
    with style():
        figure = Figure(figsize=(4.4, 4.4), layout="constrained")
        axes = figure.subplots()
        _draw_panel(axes, rows, panel)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def curve_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]], limits: Mapping[str, tuple[float, float]]
) -> Figure:
    """Training curves of one method, one small plot above another.

    Args:
        curves: name of the quantity -> (step, value) points in order.
        limits: range of the y axis by name, so that pictures of several methods compare.
    """
    with style():
        figure = Figure(figsize=(2.4, 0.4 + 1.25 * len(curves)), layout="constrained")
        stacked = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, points), colour in zip(stacked, curves.items(), (BLUE, RED), strict=False):
            steps, values = zip(*points, strict=True)
            marker = "." if len(steps) < 3 else ""
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker)
            axes.set_ylabel(name)
            if name in limits:
                axes.set_ylim(*_padded(*limits[name]))
            axes.yaxis.set_major_locator(MaxNLocator(4))
        stacked[-1].xaxis.set_major_locator(MaxNLocator(4, integer=True))
        stacked[-1].set_xlabel("step")
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
    def value(name: str) -> tuple[float, float, float]:
        low, high = rows[name][f"{panel.key}_ci95"]
        return tuple(panel.scale * x for x in (rows[name][panel.key], low, high))  # type: ignore

    ours, unfiltered = _series(rows, filtered=True), _series(rows, filtered=False)
    ticks = sorted({k for k, _ in [*ours, *unfiltered]} | ({1} if "spin" in rows else set())) or [1]
    for name, (colour, dashes) in _LINES.items():
        if name in rows:
            middle, low, high = value(name)
            axes.axhline(middle, color=colour, linestyle=dashes, linewidth=1.5, label=name)
            if high > low:
                axes.axhspan(low, high, color=colour, alpha=0.10, linewidth=0)
    if ours:
        _bars(axes, ours, value, label="self-contrast-k", color=BLUE, marker="o", linestyle="-")
    if unfiltered:
        style = {"color": RED, "marker": "s", "linestyle": "", "markerfacecolor": "white"}
        shifted = [(k * 1.09, name) for k, name in unfiltered]
        _bars(axes, shifted, value, label="self-contrast-k, unfiltered", **style)
    if "spin" in rows:
        style = {"color": SKY, "marker": "D", "linestyle": "", "markerfacecolor": "white"}
        _bars(axes, [(1 / 1.09, "spin")], value, label="spin", **style)
    _axis(axes, panel, ticks)
    _off_scale(axes, rows, value)


def _series(rows: Rows, *, filtered: bool) -> list[tuple[float, str]]:
    """(k, method) of the self-contrast methods, with or without the similarity cut, by k."""
    found = [(name, _OURS.fullmatch(name)) for name in rows]
    return sorted(
        (float(match["k"]), name)
        for name, match in found
        if match and bool(match["unfiltered"]) != filtered
    )


def _bars(axes: Axes, series: Sequence[tuple[float, str]], value: Any, **style: Any) -> None:
    numbers = [value(name) for _, name in series]
    axes.errorbar(
        [k for k, _ in series],
        [middle for middle, _, _ in numbers],
        yerr=[[m - low for m, low, _ in numbers], [high - m for m, _, high in numbers]],
        capsize=3,
        linewidth=1.8,
        elinewidth=1.3,
        markersize=6,
        zorder=3,
        **style,
    )


def _axis(axes: Axes, panel: Panel, ticks: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlim(min(ticks) / 1.35, max(ticks) * 1.35)
    axes.set_xlabel("Number of negatives k")
    axes.set_title(panel.label, fontsize=10, loc="left")
    axes.grid(axis="x", visible=False)


def _off_scale(axes: Axes, rows: Rows, value: Any) -> None:
    """Other temperatures as arrows at the edge: drawn to scale they would flatten all the rest."""
    low, high = axes.get_ylim()
    for name in rows:
        if not name.startswith("sft-temperature-"):
            continue
        middle = value(name)[0]
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
