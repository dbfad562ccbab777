"""Write the demo's numbers into README.md, from the result files in bench/results/demo/.

    python bench/readme_numbers.py            rewrite README's block and the figure
    python bench/readme_numbers.py --check    exit 1 when README does not say what the files say

The runs (one file per seed, made by bench/collect_demo.py) are pooled: every prompt of every run
counts once, and methods are compared prompt by prompt. Sentences come from the intervals.
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import documents
import numpy as np

from scmini.evaluation.report import figures, page, wording
from scmini.evaluation.report.wording import TARGETS, Unit, number
from scmini.evaluation.win_rate import Comparison, bootstrap_ci95, compare, perfect_share, wins

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results" / "demo"
FIGURE = "bench/results/demo/demo.png"
BEGIN, END = "<!-- demo-results:begin -->", "<!-- demo-results:end -->"
SAMPLES, SEED = 2000, 0

Runs = list[dict[str, Any]]


def read_runs(folder: Path) -> Runs:
    """All result files, by seed; they must differ in nothing of the configuration but the seed."""
    runs = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise SystemExit(f"{folder}: no result file; make them with bench/collect_demo.py")
    runs.sort(key=lambda run: run["config"]["seed"])
    for run in runs:
        different = [
            key
            for key, value in runs[0]["config"].items()
            if key not in ("seed", "name") and run["config"].get(key) != value
        ]
        if different:
            seed, keys = run["config"]["seed"], ", ".join(different)
            raise SystemExit(f"seed {seed} was run with another configuration: {keys}")
    return runs


def pooled_rows(runs: Runs) -> dict[str, dict[str, Any]]:
    """Rows like those of results.json, over all prompts of all runs."""
    rows = {}
    for method in runs[0]["methods"]:
        rewards = np.concatenate([run["per_prompt"][method] for run in runs])
        targets = np.concatenate([run["per_prompt"][TARGETS] for run in runs])
        outcome = wins(rewards, targets)
        low, high = bootstrap_ci95(outcome, samples=SAMPLES, seed=SEED)
        trained = [run["methods"][method]["training"] for run in runs]
        rows[method] = {
            "win_rate": 100 * float(outcome.mean()),
            "win_rate_ci95": [100 * low, 100 * high],
            "mean_reward": float(rewards.mean()),
            "mean_reward_ci95": list(bootstrap_ci95(rewards, samples=SAMPLES, seed=SEED)),
            "per_run": [float(np.mean(run["per_prompt"][method])) for run in runs],
            "perfect_share": perfect_share(rewards),
            "ties": float((outcome == 0.5).mean()),
            "n": len(rewards),
            "training": {key: _mean(trained, key) for key in trained[0]},
        }
    return rows


def comparer(runs: Runs) -> Callable[[str, str], Comparison]:
    """(a, b) -> paired comparison over all runs."""

    @cache
    def versus(a: str, b: str) -> Comparison:
        pair = [[run["per_prompt"][name] for run in runs] for name in (a, b)]
        return compare(a, pair[0], b, pair[1], samples=SAMPLES, seed=SEED)

    return versus


def block(runs: Runs) -> str:
    """What stands between the two markers in README.md."""
    config = runs[0]["config"]
    rows, versus = pooled_rows(runs), comparer(runs)
    unit, main = wording.unit_of(runs[0]["grader"]), wording.main_method(rows)
    facts = {
        "toy": config["data"]["format"] == "zoo",
        "temperature": config["generate"]["temperature"],
        "sft_continued_learning_rate": config["sft_continued"]["learning_rate"],
        "num_runs": len(runs),
    }
    rivals = [versus(main, name) for name in wording.rivals(list(rows))]
    remarks = wording.caveats(rows, versus, unit, facts)
    seeds = ", ".join(str(run["config"]["seed"]) for run in runs)
    total = rows[main]["n"]
    parts = [
        f"![Win rate and mean reward against the number of negatives]({FIGURE})",
        wording.headline(rivals, unit),
        f"Seeds {seeds}, {total:,} test prompts in all. Mean reward{_range(unit)} and win rate "
        "against the target with 95 % bootstrap intervals over the pooled prompts; differences are "
        "paired by prompt, and one is named only where its interval leaves out 0.",
        method_table(rows, unit, program=runs[0]["grader"] == "program"),
        "What this shows, and what it does not:",
        "\n".join(f"- **{topic}.** {text}" for topic, text in remarks),
        cost_text(runs),
        cost_table(runs),
    ]
    return "\n\n".join(parts)


def method_table(rows: dict[str, dict[str, Any]], unit: Unit, *, program: bool) -> str:
    """One line per method, in Markdown."""
    heads = ["Method", f"Mean reward{_range(unit)}", "By seed", "Win rate, %"]
    heads += (
        ["Perfect"] * program + ["Negatives per prompt"] + ["Perfect among negatives"] * program
    )
    lines = []
    for name, row in rows.items():
        training = row["training"]
        cells = [
            name,
            _interval(row, "mean_reward", unit.scale, unit.digits),
            " / ".join(unit.number(mean) for mean in row["per_run"]),
            _interval(row, "win_rate", 1, 1),
        ]
        perfect = _cell(training.get("perfect_share_of_negatives"), "{:.1%}")
        cells += [f"{row['perfect_share']:.1%}"] * program
        cells += [_cell(training.get("effective_k"), "{:.1f}")] + [perfect] * program
        lines.append(cells)
    return _markdown(heads, lines)


def cost_text(runs: Runs) -> str:
    """Where and how long, in a sentence."""
    totals = [sum(stage["seconds"] for stage in run["stages"].values()) for run in runs]
    span = " to ".join(dict.fromkeys(page.duration(x) for x in (min(totals), max(totals))))
    where = runs[0]["device"]
    accelerator = where["accelerator"] or "no GPU"
    cores = page.cores(where["cores"])
    return (
        f"A run took {span} in all stages together, on {cores} of "
        f"{where['processor']} with {where['memory_gib']:g} GiB of memory, {accelerator}:"
    )


def cost_table(runs: Runs) -> str:
    """Mean time per stage, all methods together, and the largest peak memory."""
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for run in runs:
        for name, cost in run["stages"].items():
            stage = name.partition(":")[0]
            seconds[stage] = seconds.get(stage, 0) + cost["seconds"] / len(runs)
            if cost["peak_gib"] is not None:
                peaks[stage] = max(peaks.get(stage, 0), cost["peak_gib"])
    lines = [
        [stage, page.duration(value), _cell(peaks.get(stage), "{:.2f}")]
        for stage, value in seconds.items()
    ]
    return _markdown(["Stage, all methods", "Time", "Peak memory, GiB"], lines)


def main(arguments: list[str] | None = None) -> int:
    parser = documents.parser(__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the result files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    runs = read_runs(options.results)
    old, name = options.readme.read_text("utf-8"), options.readme.name
    fresh = {options.readme: documents.replaced(old, (BEGIN, END), block(runs), name)}
    code = documents.finish(fresh, "readme_numbers.py", check=options.check)
    if options.check:
        return code
    picture = figures.win_rate_figure(pooled_rows(runs), wording.unit_of(runs[0]["grader"]).scale)
    (options.results / "demo.svg").write_text(figures.to_svg(picture, "demo"), encoding="utf-8")
    (options.results / "demo.png").write_bytes(figures.to_png(picture))
    return 0


def _range(unit: Unit) -> str:
    return " (0 to 100)" if unit.scale == 100 else ""


def _interval(row: dict[str, Any], key: str, scale: float, digits: int) -> str:
    low, high = (number(scale * x, digits) for x in row[f"{key}_ci95"])
    middle = number(scale * row[key], digits)
    return middle if low == high else f"{middle} ({low} to {high})"


def _mean(facts: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([fact[key] for fact in facts]))


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _markdown(heads: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(heads) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *lines])


if __name__ == "__main__":
    sys.exit(main())
