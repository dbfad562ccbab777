"""Pieces of the documents' tables."""

from __future__ import annotations

from collections.abc import Sequence

from rows import Row


def table(heads: list[str], lines: list[list[str]]) -> str:
    """In Markdown; all columns but the first are numbers."""
    rule = ["---"] + ["--:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *lines])


def seconds(row: Row, name: str = "seconds") -> str:
    """Median and the 20th to 80th percentile."""
    spread = row[name]
    return f"{spread['median']:.3g} ({spread['p20']:.3g} to {spread['p80']:.3g})"


def absent(rows: Sequence[Row]) -> list[str]:
    """A sentence about the peers that could not be measured; none where all were."""
    found: dict[str, str] = {}
    for row in rows:
        found |= row.get("absent", {})
    if not found:
        return []
    names = "; ".join(f"{name} ({why})" for name, why in found.items())
    return [f"Not measured here: {names}."]
