"""Stage `report`: results.json, results.csv, the figure, and the page to look at."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from scmini import console
from scmini.config import Config
from scmini.config_file import config_to_yaml
from scmini.evaluation import figures, page, run_data, wording
from scmini.evaluation.win_rate import Comparison, compare, perfect_share, summary
from scmini.records import Generation, Reward
from scmini.store import Work, versions, write_atomic

CURVES = {"loss": "loss", "rewards/margins": "margin"}
SHOWN_ANSWERS, SHOWN_PROMPTS, SHOWN_CANDIDATES = 6, 4, 4
_COLUMNS = (
    *("win_rate", "win_rate_low", "win_rate_high"),
    *("mean_reward", "mean_reward_low", "mean_reward_high", "mean_sigmoid_reward"),
    *("perfect_share", "ties", "mean_length", "n"),
    *("prompts", "effective_k", "perfect_share_of_negatives", "mean_reward_of_negatives"),
)
_ORDER = (
    *("data", "base", "sft", "sample", "embed", "filter", "reference", "dpo", "generate", "reward"),
)

Inputs = dict[str, Path]


def run(config: Config, inputs: Inputs, work: Work) -> None:
    """Write all products of the report; nothing is kept between two attempts."""
    rewards = run_data.read_all_rewards(config.methods, inputs)
    ids = [reward.id for reward in rewards[config.methods[0]]]
    generations = run_data.read_all_generations(config.methods, inputs, ids)
    results: dict[str, Any] = {
        "name": config.name,
        "grader": config.grader,
        "methods": method_results(config, inputs, rewards, generations),
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "device": device(inputs),
        "stages": stage_results(inputs),
    }
    write_atomic(work.path / "results.json", _json(results))
    write_atomic(work.path / "results.csv", results_csv(results["methods"]).encode())
    scale = wording.unit_of(config.grader).scale
    picture = figures.win_rate_figure(results["methods"], scale)
    write_atomic(work.path / "win_rate.svg", figures.to_svg(picture, "win_rate").encode())
    write_atomic(work.path / "win_rate.png", figures.to_png(picture))
    view = page_view(config, inputs, results, rewards, generations)
    write_atomic(work.path / "index.html", page.render(view).encode())
    console.say(view["headline"])


def method_results(
    config: Config,
    inputs: Inputs,
    rewards: Mapping[str, list[Reward]],
    generations: Mapping[str, list[Generation]],
) -> dict[str, dict[str, Any]]:
    """The rows of results.json: the targets, then every method."""
    options = {"samples": config.report.bootstrap_samples, "seed": config.seed}
    first = config.methods[0]
    targets = [reward.target_reward for reward in rewards[first]]
    lengths = [len(generation.target) for generation in generations[first]]
    rows: dict[str, dict[str, Any]] = {
        wording.TARGETS: {**summary(targets, targets, lengths, **options), "training": {}}
    }
    own = {wording.TARGETS: targets}
    for method in config.methods:
        own[method] = [reward.reward for reward in rewards[method]]
        targets = [reward.target_reward for reward in rewards[method]]
        lengths = [len(generation.response) for generation in generations[method]]
        rows[method] = {
            **summary(own[method], targets, lengths, **options),
            "training": run_data.training_facts(method, config, inputs),
        }
    if config.grader == "program":
        for name, row in rows.items():
            row["perfect_share"] = perfect_share(own[name])
    return rows


def stage_results(inputs: Inputs) -> dict[str, dict[str, float | None]]:
    """Seconds and peak memory of every stage that is among the inputs, in the order they ran."""
    found: dict[str, tuple[str, dict[str, float | None]]] = {}
    for folder in inputs.values():
        manifest = run_data.read_manifest(folder)
        stage, method = manifest["recipe"]["stage"], manifest["recipe"]["method"]
        key = f"{stage}:{method}" if method else stage
        peak = manifest["notes"].get("peak_gib")
        found[key] = manifest["finished"], {"seconds": manifest["seconds"], "peak_gib": peak}
    by_time = sorted(found, key=lambda key: found[key][0])
    ordered = sorted(by_time, key=lambda key: _ORDER.index(key.partition(":")[0]))
    return {key: found[key][1] for key in ordered}


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
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", *_COLUMNS])
    for name, row in rows.items():
        flat = {**row, **row["training"]}
        for key in ("win_rate", "mean_reward"):
            flat[f"{key}_low"], flat[f"{key}_high"] = row[f"{key}_ci95"]
        cells = (flat.get(column, "") for column in _COLUMNS)
        writer.writerow([name, *(round(x, 6) if isinstance(x, float) else x for x in cells)])
    return out.getvalue()


def page_view(
    config: Config,
    inputs: Inputs,
    results: Mapping[str, Any],
    rewards: Mapping[str, list[Reward]],
    generations: Mapping[str, list[Generation]],
) -> dict[str, Any]:
    """Everything that the page's template names."""
    rows, unit = results["methods"], wording.unit_of(config.grader)
    main = wording.main_method(rows)

    @cache
    def versus(a: str, b: str) -> Comparison:
        pair = [[_own(rewards, name)] for name in (a, b)]
        options = {"samples": config.report.bootstrap_samples, "seed": config.seed}
        return compare(a, pair[0], b, pair[1], **options)

    shown = run_data.evenly(range(len(rewards[config.methods[0]])), SHOWN_ANSWERS)
    panels = [(p, figures.panel_figure(rows, p)) for p in figures.panels(unit.scale)]
    return {
        "name": config.name,
        "headline": wording.headline([versus(main, b) for b in wording.rivals(list(rows))], unit),
        "facts": facts(config, results, inputs),
        "panels": [
            {"label": p.label, "uri": page.svg_uri(figures.to_svg(f, p.key))} for p, f in panels
        ],
        "num_prompts": len(rewards[config.methods[0]]),
        "rows": page.method_rows(rows, unit, main),
        "has_perfect": config.grader == "program",
        "reward_unit": " (0 to 100)" if unit.scale == 100 else "",
        "caveats": wording.caveats(rows, versus, unit, _caveat_facts(config)),
        "curves": curve_pictures(config, inputs),
        **negatives(config, inputs),
        "embedding_note": embedding_note(config, inputs),
        "answers": page.answer_cards(generations, rewards, shown, unit),
        "stages": page.stage_rows(results["stages"]),
        "cost_note": cost_note(results),
        "config_yaml": config_to_yaml(config),
        "versions": results["versions"],
        "versions_yaml": json.dumps(
            {**results["versions"], **results["device"]}, indent=1, ensure_ascii=False
        ),
    }


def facts(config: Config, results: Mapping[str, Any], inputs: Inputs) -> list[tuple[str, str]]:
    """The section "what was run", line by line."""
    targets = results["methods"][wording.TARGETS]
    base = config.model.model_name_or_path or "a small Llama, trained on the spot (stage base)"
    judge = "the demo's program, 0 to 1"
    if config.grader == "model":
        judge = config.reward.model_name_or_path or (
            "a small reward model, trained on the data set's preferences"
            + _reward_model_accuracy(inputs)
        )
    where = {"zoo": "zoo keeper, the embedded demo"}.get(config.data.format, config.data.format)
    temperature, dpo = config.generate.temperature, config.dpo
    return [
        ("Methods", ", ".join(config.methods)),
        ("Model", base),
        ("Data", where),
        ("Negatives", f"{config.sample.n} answers per prompt at T = {config.sample.temperature:g}"),
        ("Test", f"{targets['n']:,} prompts, one answer of each method at T = {temperature:g}"),
        ("Grader", judge),
        ("DPO", f"{dpo.loss_type}, beta {dpo.beta:g}, learning rate {dpo.learning_rate:g}"),
        ("Seed", str(config.seed)),
    ]


def _reward_model_accuracy(inputs: Inputs) -> str:
    notes = run_data.read_manifest(inputs["base"]).get("notes", {}) if "base" in inputs else {}
    if "reward_model_accuracy" not in notes:
        return ""
    pairs = notes["reward_model_held_out_pairs"]
    return f" (right on {100 * notes['reward_model_accuracy']:.0f} % of {pairs} held-out pairs)"


def curve_pictures(config: Config, inputs: Inputs) -> list[dict[str, str]]:
    """Small multiples: loss and margin of every trained method."""
    curves = {}
    for method in config.methods:
        if not method.startswith("sft-temperature-"):
            found = run_data.read_curves(inputs[f"train:{method}"], CURVES)
            curves.update({method: found} if found else {})
    limits: dict[bool, dict[str, tuple[float, float]]] = {True: {}, False: {}}
    for found in curves.values():  # SFT's loss is another quantity than DPO's
        mine = limits["margin" in found]
        for name, points in found.items():
            values = [value for _, value in points] + list(mine.get(name, ()))
            mine[name] = min(values), max(values)
    return [
        {
            "method": method,
            "uri": page.svg_uri(
                figures.to_svg(figures.curve_figure(found, limits["margin" in found]), method)
            ),
        }
        for method, found in curves.items()
    ]


def negatives(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What became of the answers: a table, a histogram, some prompts with kept and dropped ones."""
    rules = run_data.read_rules(inputs)
    table = page.rule_table(rules) if rules else None
    ours = wording.by_k(config.methods)
    pairs = run_data.trained_pairs(ours[-1], config, inputs) if ours else ()
    taken = {pair.id: pair.response_index for pair in pairs}
    if not taken:
        return {"rule_table": table, "similarity": None, "contrasts": []}
    found = run_data.similarities(taken, inputs)
    limits = {key: getattr(config.filter, key) for key in ("min_similarity", "max_similarity")}
    picture = figures.similarity_figure(
        run_data.BINS.tolist(),
        {
            "taken as negatives": found.taken.tolist(),
            "candidates, not drawn": found.spared.tolist(),
            "dropped": found.dropped.tolist(),
        },
        found.cut,
        [(key, value) for key, value in limits.items() if value is not None],
    )
    shown = run_data.evenly(list(taken), SHOWN_PROMPTS)
    contrasts = run_data.contrasts(ours[-1], shown, config, inputs, answers=SHOWN_CANDIDATES)
    return {
        "rule_table": table,
        "similarity": {
            "uri": page.svg_uri(figures.to_svg(picture, "similarity")),
            "method": ours[-1],
            "has_cut": found.cut is not None,
        },
        "contrasts": page.contrast_cards(contrasts),
    }


def embedding_note(config: Config, inputs: Inputs) -> str:
    """How many texts were too long for the encoder, and what became of them; empty if none was."""
    notes = run_data.read_manifest(inputs["embed"])["notes"] if "embed" in inputs else {}
    if not (share := notes.get("long_share")):
        return ""
    how = {
        "truncate": "only their openings are compared",
        "mean": "they are read in pieces, whose vectors are averaged",
    }[config.embed.long_texts]
    return f"{page.percent(share)} of the texts are longer than the encoder reads at once: {how}."


def cost_note(results: Mapping[str, Any]) -> str:
    """Total time and the machine it was measured on."""
    total = sum(stage["seconds"] for stage in results["stages"].values())
    where = results["device"]
    accelerator = f", {where['accelerator']}" if where["accelerator"] else ""
    return (
        f"{page.duration(total)} in all stages together, on {page.cores(where['cores'])} of "
        f"{where['processor']} with {where['memory_gib']} GiB of memory{accelerator}. A stage that "
        "an earlier run had finished counts with the time it took then."
    )


def _own(rewards: Mapping[str, list[Reward]], name: str) -> list[float]:
    if name == wording.TARGETS:
        return [reward.target_reward for reward in next(iter(rewards.values()))]
    return [reward.reward for reward in rewards[name]]


def _caveat_facts(config: Config) -> dict[str, Any]:
    return {
        "toy": config.data.format == "zoo",
        "temperature": config.generate.temperature,
        "sft_continued_learning_rate": config.sft_continued.learning_rate,
        "num_runs": 1,
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
