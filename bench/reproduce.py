"""Write the tables of docs/reproduce.md: what recipes cost, the paper's results beside ours.

    python bench/reproduce.py            rewrite the blocks
    python bench/reproduce.py --check    exit 1 when the document does not say what the files say

Costs are those of `scmini plan`. Our results are read from bench/results/reproduce/<recipe>.json,
each a copy of the results.json of such a run; where there is none it says so.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import documents

from scmini.config_file import load_config
from scmini.console import size
from scmini.planning.plan import plan

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reproduce.md"
RESULTS = ROOT / "bench" / "results" / "reproduce"
RECIPES = ("hh-rlhf-7b", "nectar-7b", "ultrachat-7b")
CARDS = ("rtx-3090", "rtx-4090", "rtx-5090", "a10g", "l4", "h200")
NOT_MEASURED = "not measured"

# The paper's tables were not at hand. These bounds are those of the axis of its figure for HH-RLHF,
# in the plotting script of its repository: its upper part shows 77 to 87 %, SFT lies below.
PAPER = {"hh-rlhf-7b": {"sft": "below 77 %", None: "between 77 and 87 %"}}


def costs() -> str:
    """Memory, disk and hours of each recipe on each card."""
    lines = [
        "| recipe | card | largest stage, GiB | disk | hours |",
        "| --- | --- | --: | --: | --: |",
    ]
    for recipe in RECIPES:
        for card in CARDS:
            made = plan(load_config(recipe), gpu=card, bench=None)
            found = made.on_cards[0]
            most = max(found.stages, key=lambda each: each.peak)
            hours = "?" if found.seconds is None else f"{found.seconds / 3600:.0f}"
            memory = f"{most.peak / 2**30:.1f} ({most.task.stage})"
            fits = hours if not found.misfits else "does not fit"
            lines.append(f"| {recipe} | {card} | {memory} | {size(made.disk)} | {fits} |")
    return "\n".join(lines)


def downloads() -> str:
    """Weights that each recipe fetches."""
    lines = ["| recipe | weights | size |", "| --- | --- | --: |"]
    for recipe in RECIPES:
        for name, count in plan(load_config(recipe), gpu="rtx-4090", bench=None).downloads.items():
            lines.append(f"| {recipe} | {name} | {size(count)} |")
    return "\n".join(lines)


def results(folder: Path = RESULTS) -> str:
    """The paper's win rates against the target beside ours."""
    lines = [
        "| recipe | method | paper: win rate | ours (95 % interval) | ours, length-controlled |",
        "| --- | --- | --- | --- | --- |",
    ]
    for recipe in RECIPES:
        path = folder / f"{recipe}.json"
        rows = json.loads(path.read_text("utf-8"))["methods"] if path.is_file() else {}
        published = PAPER.get(recipe, {})
        for method in load_config(recipe).methods:
            paper = published.get(method, published.get(None, "no figure at hand"))
            row = rows.get(method, {})
            cells = [recipe, method, paper, _rate(row, "win_rate")]
            lines.append(f"| {' | '.join([*cells, _rate(row, 'length_controlled_win_rate')])} |")
    return "\n".join(lines)


def _rate(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None:
        return NOT_MEASURED
    low, high = row[f"{key}_ci95"]
    return f"{row[key]:.1f} % ({low:.1f} to {high:.1f})"


def rewritten(text: str, folder: Path = RESULTS) -> str:
    """The document with fresh blocks."""
    blocks = {"downloads": downloads(), "costs": costs(), "results": results(folder)}
    for name, block in blocks.items():
        markers = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        text = documents.replaced(text, markers, block, str(DOCUMENT))
    return text


def main(argv: list[str] | None = None) -> int:
    check = documents.parser(__doc__).parse_args(argv).check
    os.environ["HF_HUB_CACHE"] = str(ROOT / "no-such-cache")  # what is here already counts as well
    fresh = rewritten(DOCUMENT.read_text("utf-8"))
    return documents.finish({DOCUMENT: fresh}, "reproduce.py", check=check)


if __name__ == "__main__":
    sys.exit(main())
