"""Draw the benchmark rows, and write their tables into docs/benchmarks.md.

    python bench/plot.py            figures next to the rows, tables into the documents
    python bench/plot.py --check    exit 1 when a document does not say what the rows say

The documents are docs/benchmarks.md, with every row, and README.md, with the summary.

Only the newest row of each (case, peer, device) counts. What was not measured is named so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import documents
import pictures
import rows
import tables
from matplotlib.figure import Figure

from scmini.evaluation.report import figures

DOCUMENT = rows.ROOT / "docs" / "benchmarks.md"
README = rows.ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
DRAWINGS: dict[str, tuple[str, Callable[[Sequence[rows.Row]], Figure | None]]] = {
    "speedup": ("Speed-up of a DPO step against P/R", pictures.speedup),
    "memory": ("Peak memory of a step by implementation", pictures.memory_bars),
    "memory-k": ("Peak memory of a step against k", pictures.memory_lines),
    "roofline": ("Head and attention under the measured roof", pictures.roofline),
    "errors": ("Error against fp64 beside speed", pictures.errors),
}


def read_devices(results: Path) -> dict[str, list[rows.Row]]:
    """Newest rows by device, the CPU first."""
    found = {}
    for folder in sorted(results.iterdir() if results.is_dir() else []):
        mine = [row for what in rows.KINDS for row in rows.read(folder / f"{what}.jsonl")]
        if mine:
            found[folder.name] = rows.newest(mine)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "cpu", item[0])))


def block(devices: dict[str, list[rows.Row]], drawn: dict[str, list[tuple[str, str]]]) -> str:
    """What stands between the two markers."""
    parts = [tables.device_section(name, found, drawn[name]) for name, found in devices.items()]
    if "cpu" not in devices:
        parts.append(tables.not_measured("CPU"))
    if not set(devices) - {"cpu"}:
        parts.append(tables.not_measured("GPU"))
    return "\n\n".join(parts)


def draw(found: Sequence[rows.Row]) -> dict[str, Figure]:
    """The figures that these rows are enough for, by name."""
    drawings = {name: function(found) for name, (_, function) in DRAWINGS.items()}
    return {name: figure for name, figure in drawings.items() if figure is not None}


def main(arguments: list[str] | None = None) -> int:
    parser = documents.parser(__doc__)
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of the rows")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="for every row")
    parser.add_argument("--summary", type=Path, help="for the summary (README.md with its rows)")
    options = parser.parse_args(arguments)
    devices = read_devices(options.results)
    figures_of = {name: draw(found) for name, found in devices.items()}
    texts = {options.document: block(devices, _links(figures_of, options))}
    if options.summary is not None:
        texts[options.summary] = tables.summary(devices)
    elif options.results == rows.RESULTS:
        texts[README] = tables.summary(devices)
    fresh = {
        path: documents.replaced(path.read_text("utf-8"), (BEGIN, END), text, path.name)
        for path, text in texts.items()
    }
    drawings = {
        options.results / name / f"{kind}.png": figure
        for name, drawn in figures_of.items()
        for kind, figure in drawn.items()
    }
    if not options.check:
        for path, figure in drawings.items():
            svg = figures.to_svg(figure, path.stem)
            path.with_suffix(".svg").write_text(svg, encoding="utf-8")
            path.write_bytes(figures.to_png(figure))
    return documents.finish(fresh, "plot.py", check=options.check, must_exist=drawings)


def _links(
    figures_of: dict[str, dict[str, Figure]], options: argparse.Namespace
) -> dict[str, list[tuple[str, str]]]:
    """By device, (description, path as the document sees it) of every figure."""
    folder = options.document.resolve().parent
    return {
        name: [
            (
                f"{DRAWINGS[kind][0]}, {name}",
                Path(os.path.relpath(options.results / name / f"{kind}.png", folder)).as_posix(),
            )
            for kind in drawn
        ]
        for name, drawn in figures_of.items()
    }


if __name__ == "__main__":
    sys.exit(main())
