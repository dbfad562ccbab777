"""Stage `report`: results.json, results.csv, the figure, and the page to look at."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from scmini import console
from scmini.config import Config
from scmini.evaluation.benchmarks import official_layouts
from scmini.evaluation.benchmarks import results as benchmark_results
from scmini.evaluation.report import figures, page, run_data, wording
from scmini.evaluation.report import view as report_view
from scmini.evaluation.report.pictures import draw
from scmini.evaluation.report.view import Generations, Inputs, Rewards
from scmini.evaluation.win_rate import bootstrap_ci95, perfect_share, summary
from scmini.store import Work, versions, write_atomic

_INTERVALS = ("win_rate", "mean_reward", "length_controlled_win_rate", "mean_length")
_COLUMNS = (
    *("win_rate", "win_rate_low", "win_rate_high"),
    *("mean_reward", "mean_reward_low", "mean_reward_high", "mean_sigmoid_reward"),
    *("perfect_share", "ties", "mean_length", "n"),
    *("prompts", "effective_k", "perfect_share_of_negatives", "mean_reward_of_negatives"),
    *("iterations", "length_controlled_win_rate", "length_controlled_win_rate_low"),
    *("length_controlled_win_rate_high", "mean_length_low", "mean_length_high", "length_ratio"),
)
_OF_BENCHMARK = ("", "_low", "_high", "_n", "_failed")
PLAN = "plan.json"
_ORDER = (
    *("data", "base", "sft", "sample", "embed", "filter", "reference", "dpo", "generate", "reward"),
    *("benchmark", "judge"),
)
_OF_GRADES = (
    *("win_rate", "win_rate_ci95", "mean_reward", "mean_reward_ci95", "mean_sigmoid_reward"),
    *("ties", "length_controlled_win_rate", "length_controlled_win_rate_ci95"),
)
"""Null in results.json where nobody graded."""


def run(config: Config, inputs: Inputs, work: Work) -> None:
    """Write all products of the report; nothing is kept between two attempts."""
    methods, rewards, ids = config.methods, {}, None
    if config.grader != "none":
        rewards = run_data.read_all_rewards(methods, inputs)
        ids = [reward.id for reward in rewards[methods[0]]]
    generations = run_data.read_all_generations(methods, inputs, ids)
    scores = benchmark_results.read_scores(methods, inputs)
    rows = method_results(config, inputs, rewards, generations)
    for name, row in rows.items():
        row["benchmarks"] = scores.get(name, {})
    results: dict[str, Any] = {
        "name": config.name,
        "grader": config.grader,
        "methods": rows,
        "config": config.to_show().model_dump(mode="json"),
        "versions": versions(),
        "device": device(inputs),
        "stages": stage_results(inputs),
        "plan": read_plan(work.path),
    }
    drawn = draw(config, inputs)
    write_atomic(work.path / "results.json", _json(results))
    write_atomic(work.path / "results.csv", results_csv(rows).encode())
    official_layouts.write(config, inputs, scores, work.path)
    more = {f"figures/{name}": picture for name, picture in drawn.files.items()}
    for name, picture in (pictures(config, rows, scores) | more).items():
        (work.path / name).parent.mkdir(exist_ok=True)
        write_atomic(work.path / f"{name}.svg", figures.to_svg(picture, name).encode())
        write_atomic(work.path / f"{name}.png", figures.to_png(picture))
    view = report_view.page_view(config, inputs, results, rewards, generations, drawn)
    write_atomic(work.path / "index.html", page.render(view).encode())
    console.say(view["headline"])


def pictures(
    config: Config, rows: wording.Rows, scores: benchmark_results.Scores
) -> dict[str, Figure]:
    """Figures by file name: win_rate, benchmarks, and mean_length where there is neither."""
    found, rows = {}, report_view.drawable(rows)
    if config.grader != "none":
        scale = wording.unit_of(config.grader).scale
        found["win_rate"] = figures.win_rate_figure(rows, scale)
    if panels := benchmark_results.panels(scores):
        drawn = benchmark_results.drawn_rows(scores)
        found["benchmarks"] = figures.panels_figure(drawn, panels)
    return found or {"mean_length": figures.panels_figure(rows, [figures.LENGTH])}


def method_results(
    config: Config, inputs: Inputs, rewards: Rewards, generations: Generations
) -> dict[str, dict[str, Any]]:
    """The rows of results.json: the targets, then every method."""
    first = config.methods[0]
    target_lengths = [len(generation.target) for generation in generations[first]]
    lengths = {wording.TARGETS: target_lengths} | {
        method: [len(generation.response) for generation in generations[method]]
        for method in config.methods
    }
    options = {"samples": config.report.bootstrap_samples, "seed": config.seed}
    rows: dict[str, dict[str, Any]] = {}
    for name, of_name in lengths.items():
        if rewards:
            graded = rewards[first if name == wording.TARGETS else name]
            targets = [reward.target_reward for reward in graded]
            own = targets if name == wording.TARGETS else [reward.reward for reward in graded]
            rows[name] = summary(own, targets, of_name, target_lengths, **options)
            if config.grader == "program":
                rows[name]["perfect_share"] = perfect_share(own)
        else:
            rows[name] = _ungraded(of_name, target_lengths)
        rows[name]["mean_length_ci95"] = list(bootstrap_ci95(of_name, **options))
        training = {} if name == wording.TARGETS else run_data.training_facts(name, config, inputs)
        rows[name]["training"] = training
    return rows


def _ungraded(lengths: Sequence[int], target_lengths: Sequence[int]) -> dict[str, Any]:
    """A row without grades: the same keys, and lengths alone have values."""
    mine, theirs = mean(lengths), mean(target_lengths)
    return {
        **dict.fromkeys(_OF_GRADES),
        "mean_length": mine,
        "n": len(lengths),
        "mean_target_length": theirs,
        "length_ratio": mine / theirs if theirs else None,
        "longer": mean(a > b for a, b in zip(lengths, target_lengths, strict=True)),
    }


def stage_results(inputs: Inputs) -> dict[str, dict[str, float | None]]:
    """Seconds and peak memory of every stage that is among the inputs, in the order of stages."""
    found: dict[str, tuple[str, dict[str, float | None]]] = {}
    for folder in inputs.values():
        manifest = run_data.read_manifest(folder)
        stage, method = manifest["recipe"]["stage"], manifest["recipe"]["method"]
        key = f"{stage}:{method}" if method else stage
        peak = manifest["notes"].get("peak_gib")
        found[key] = manifest["finished"], {"seconds": manifest["seconds"], "peak_gib": peak}

    def place(key: str) -> tuple[int, bool, str]:
        stage, _, method = key.partition(":")
        return _ORDER.index(stage), bool(method), found[key][0]  # what methods share, then by time

    return {key: found[key][1] for key in sorted(found, key=place)}


def read_plan(folder: Path) -> dict[str, Any]:
    """What `scmini plan` expects of the stages: plan.json of the report's own folder.

    It is put there before the stage runs, since a stage knows nothing of planning.

    Returns:
        {"gpu": name, "stages": {stage or stage:method: {"seconds", "peak_gib"}}}, or {"reason": why
        there is no plan}.
    """
    try:
        plan: dict[str, Any] = json.loads((folder / PLAN).read_bytes())
    except FileNotFoundError:
        return {"reason": "none was made for this run"}
    return plan


def device(inputs: Inputs) -> dict[str, Any]:
    """The machine: processor, cores this process may use, memory, accelerator if one was used."""
    names = [run_data.read_manifest(folder)["notes"].get("device") for folder in inputs.values()]
    accelerators = {str(name) for name in names if name and name != "cpu"}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": ", ".join(sorted(accelerators)) or None,
    }


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def results_csv(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """results.csv: one line per method; empty cells where something was not measured."""
    scores = {name: row["benchmarks"] for name, row in rows.items()}
    named = [f"{name}{end}" for name in benchmark_results.names(scores) for end in _OF_BENCHMARK]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", *_COLUMNS, *named])
    for method, row in rows.items():
        flat = {**row, **row["training"], **_bounds(row, _INTERVALS)}
        for name, entry in row["benchmarks"].items():
            flat |= {name: entry["value"], **_bounds({f"{name}_ci95": entry["ci95"]}, [name])}
            flat |= {f"{name}_n": entry["n"], f"{name}_failed": entry["failed"]}
        cells = (flat.get(column, "") for column in (*_COLUMNS, *named))
        writer.writerow([method, *(round(x, 6) if isinstance(x, float) else x for x in cells)])
    return out.getvalue()


def _bounds(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, float | None]:
    """Both ends of the intervals as columns of their own."""
    found = {}
    for key in keys:
        found[f"{key}_low"], found[f"{key}_high"] = row.get(f"{key}_ci95") or (None, None)
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
