"""What the page shows, taken together: numbers in words, pictures, examples.

The keys of `page_view` are the names that report_templates/index.html.j2 uses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scmini.config import Config
from scmini.config_file import config_to_yaml
from scmini.evaluation.benchmarks import results as benchmark_results
from scmini.evaluation.report import browser, figures, page, run_data, wording
from scmini.evaluation.report.folded_axis import is_folded
from scmini.evaluation.report.pictures import Pictures, SimilarityPicture
from scmini.evaluation.report.training_prompts import paired_methods, training_prompts
from scmini.evaluation.win_rate import Comparison, compare
from scmini.records import Generation, Reward

FEWEST_FOR_INTERVALS = 10
"""Test prompts. A bootstrap over fewer says next to nothing, and no interval is shown."""
SHOWN_ANSWERS, SHOWN_PROMPTS, SHOWN_CANDIDATES = 6, 4, 4

Inputs = Mapping[str, Path]
Rewards = Mapping[str, list[Reward]]
"""By method; empty where nobody graded."""
Generations = Mapping[str, list[Generation]]


def page_view(
    config: Config,
    inputs: Inputs,
    results: Mapping[str, Any],
    rewards: Rewards,
    generations: Generations,
    pictures: Pictures,
) -> dict[str, Any]:
    """Everything that the page's template names."""
    rows, unit = drawable(results["methods"]), wording.unit_of(config.grader)
    main = wording.main_method(rows)
    answered, answer_data = answers(config, rewards, generations, main)
    prompted, prompt_data = prompts(config, inputs)
    panels = figures.panels(unit.scale) if rewards else [figures.LENGTH]
    made = {
        "name": config.name,
        "graded": bool(rewards),
        "unit": unit.range,
        **statements(config, results["methods"], rewards),
        "facts": facts(config, results, inputs),
        "figure": drawn(rows, panels),
        "num_prompts": rows[main]["n"],
        "has_intervals": rows[main]["n"] >= FEWEST_FOR_INTERVALS,
        "table": page.method_table(rows, unit, main),
        "benchmarks": benchmarks(config, rows, main),
        "curves": curve_views(pictures.curves),
        "has_drift": pictures.has_drift,
        **negatives(inputs, pictures.similarity),
        "embedding_note": embedding_note(config, inputs),
        **answered,
        **prompted,
        "stages": page.stage_table(results["stages"], results["plan"].get("stages", {})),
        "cost_note": cost_note(results) + judging_note(inputs),
        "config_yaml": config_to_yaml(config.to_show()),
        "versions": results["versions"],
        "versions_yaml": json.dumps(
            {**results["versions"], **results["device"]}, indent=1, ensure_ascii=False
        ),
        "islands": answer_data | prompt_data,
    }
    return {**made, "contents": contents(made)}


def contents(view: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sections that the page has: anchor and title."""
    every = {
        "figure": ("Results", True),
        "benchmarks": ("Benchmarks", view["benchmarks"]),
        "limits": ("What this shows", True),
        "training": ("Training", view["curves"]),
        "similarity": ("Negatives", view["rule_table"] or view["similarity"]),
        "cost": ("Time and memory", True),
        "answers": ("Test prompts", True),
        "prompts": ("Training prompts", view["contrasts"]),
        "configuration": ("Configuration", True),
    }
    return [(anchor, title) for anchor, (title, is_there) in every.items() if is_there]


def drawable(rows: wording.Rows) -> dict[str, dict[str, Any]]:
    """The rows as they are drawn: from a handful of prompts without intervals."""
    return {
        name: {
            key: None if key.endswith("_ci95") and row["n"] < FEWEST_FOR_INTERVALS else value
            for key, value in row.items()
        }
        for name, row in rows.items()
    }


def statements(config: Config, rows: wording.Rows, rewards: Rewards) -> dict[str, Any]:
    """Headline and caveats: from paired rewards, or where there are none, from benchmarks."""
    main, unit = wording.main_method(rows), wording.unit_of(config.grader)
    facts = {
        "toy": config.data.format == "zoo" and bool(rewards),
        "temperature": config.generate.temperature,
        "sft_continued_learning_rate": config.sft_continued.learning_rate,
        "num_runs": 1,
    }
    if rewards:
        versus = comparer(config, rewards)
        rivals = [versus(main, name) for name in wording.rivals(list(rows))]
        return {
            "headline": wording.headline(rivals, unit),
            "caveats": wording.caveats(rows, versus, unit, facts),
        }
    scores = scores_of(rows)
    found = benchmark_results.headline(scores, main, ("sft", "dpo"))
    ungraded = (
        "Not graded",
        "reward.grader is none: no answer to a test prompt has a reward, so there are no win rates "
        "and nothing is said of which method is better.",
    )
    return {
        "headline": f"The answers were not graded. {found}".strip(),
        "caveats": [ungraded, *wording.about_the_run(facts)],
    }


def comparer(config: Config, rewards: Rewards) -> Callable[[str, str], Comparison]:
    """(a, b) -> paired comparison of their rewards; each pair is resampled once."""
    options = {"samples": config.report.bootstrap_samples, "seed": config.seed}

    @cache
    def versus(a: str, b: str) -> Comparison:
        return compare(a, [_own(rewards, a)], b, [_own(rewards, b)], **options)

    return versus


def scores_of(rows: wording.Rows) -> dict[str, dict[str, Any]]:
    """The benchmarks of every method, without the targets, which took none."""
    return {name: row["benchmarks"] for name, row in rows.items() if name != wording.TARGETS}


def drawn(rows: figures.Rows, panels: Sequence[figures.Panel]) -> dict[str, Any]:
    """Pictures of the panels, and whether an axis leaves something out."""
    made = [(panel, figures.panels_figure(rows, [panel])) for panel in panels]
    return {
        "panels": [
            {"label": p.label, "uri": page.svg_uri(figures.to_svg(f, p.key))} for p, f in made
        ],
        "is_folded": any(is_folded(figure.axes[0]) for _, figure in made),
    }


def benchmarks(config: Config, rows: wording.Rows, main: str) -> dict[str, Any] | None:
    """The section of benchmarks; None where none was run."""
    if not config.benchmark.tasks:
        return None
    scores = scores_of(rows)
    shown = benchmark_results.panels(scores)
    return {
        "table": benchmark_results.table(scores, main),
        "categories": benchmark_results.categories(scores, main),
        "figure": drawn(benchmark_results.drawn_rows(scores), shown),
        "remarks": benchmark_results.remarks(config, scores),
    }


def facts(config: Config, results: Mapping[str, Any], inputs: Inputs) -> list[tuple[str, str]]:
    """The section "what was run", line by line."""
    targets = results["methods"][wording.TARGETS]
    base = config.model.model_name_or_path or "a small Llama, trained on the spot (stage base)"
    judge = "the demo's program, 0 to 1"
    if config.grader == "none":
        judge = "none"
    elif config.grader == "model":
        judge = config.reward.model_name_or_path or (
            "a small reward model, trained on the data set's preferences"
            + _reward_model_accuracy(inputs)
        )
    tasks = ", ".join(config.benchmark.tasks)
    where = {"zoo": "zoo keeper, the embedded demo"}.get(config.data.format, config.data.format)
    temperature, dpo = config.generate.temperature, config.dpo
    return [
        ("Methods", ", ".join(config.methods)),
        ("Model", base),
        ("Data", where),
        ("Negatives", f"{config.sample.n} answers per prompt at T = {config.sample.temperature:g}"),
        ("Test", f"{targets['n']:,} prompts, one answer of each method at T = {temperature:g}"),
        ("Grader", judge),
        *([("Benchmarks", tasks)] if tasks else []),
        ("DPO", f"{dpo.loss_type}, beta {dpo.beta:g}, learning rate {dpo.learning_rate:g}"),
        ("Seed", str(config.seed)),
    ]


def _reward_model_accuracy(inputs: Inputs) -> str:
    notes = run_data.read_manifest(inputs["base"]).get("notes", {}) if "base" in inputs else {}
    if "reward_model_accuracy" not in notes:
        return ""
    pairs = notes["reward_model_held_out_pairs"]
    return f" (right on {100 * notes['reward_model_accuracy']:.0f} % of {pairs} held-out pairs)"


def curve_views(curves: Mapping[str, Figure]) -> list[dict[str, str]]:
    """Pictures of training, by method."""
    return [
        {"method": method, "uri": page.svg_uri(figures.to_svg(figure, method))}
        for method, figure in curves.items()
    ]


def negatives(inputs: Inputs, picture: SimilarityPicture | None) -> dict[str, Any]:
    """What became of the sampled answers: a table and a histogram."""
    rules = run_data.read_rules(inputs)
    shown = None
    if picture is not None:
        uri = page.svg_uri(figures.to_svg(picture.figure, "similarity"))
        shown = {"uri": uri, "method": picture.method, "has_cut": picture.has_cut}
    return {"rule_table": page.rule_table(rules) if rules else None, "similarity": shown}


def answers(
    config: Config, rewards: Rewards, generations: Generations, main: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Test prompts: some as cards, and as many as fit as data of the browser."""
    unit = wording.unit_of(config.grader)
    found = browser.answer_rows(generations, rewards, unit, main)
    shown, total, extreme = len(found["rows"]), found["total"], found.pop("extreme")
    note = f"All {total:,} prompts of the test set are here."
    if shown < total:
        note = (
            f"{shown:,} of {total:,} prompts; all of them are in generations/*.jsonl. "
            f"{shown - extreme:,} are spread evenly over the test set"
        )
        note += ", the others are those where some method is furthest from the target" * bool(
            extreme
        )
        note += "."
    some = run_data.evenly(range(total), SHOWN_ANSWERS)
    cards = page.answer_cards(generations, rewards, some, unit)
    return {"answers": cards, "answers_note": note}, {"answers": browser.island(found)}


def prompts(config: Config, inputs: Inputs) -> tuple[dict[str, Any], dict[str, str]]:
    """Training prompts with kept and dropped answers: some as cards, more as data."""
    methods = paired_methods(config)
    ids: list[str] = []
    if methods and "filter" in inputs:
        ids = [pair.id for pair in run_data.trained_pairs(methods[0], config, inputs)]
    if not ids:
        return {"contrasts": [], "training_note": ""}, {}
    order, some = browser.training_order(ids), run_data.evenly(ids, SHOWN_PROMPTS)
    found = training_prompts({*order, *some}, methods, config, inputs)
    data = browser.training_rows(found, order, len(ids))
    shown = len(data["rows"])
    note = f"All {shown:,} prompts that {methods[0]} is trained on are here"
    if shown < len(ids):
        note = (
            f"{shown:,} of the {len(ids):,} prompts that {methods[0]} is trained on, spread evenly"
        )
    note += "; pairs/*.jsonl and samples/ have everything."
    cards = page.contrast_cards(
        [prompt for prompt in found if prompt.id in some],
        methods[0],
        SHOWN_CANDIDATES,
        filtered=browser.is_filtered(methods[0]),
    )
    return {"contrasts": cards, "training_note": note}, {"training": browser.island(data)}


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
    """Total time, the machine it was measured on, and the plan beside it or why there is none."""
    total = sum(stage["seconds"] for stage in results["stages"].values())
    where, plan = results["device"], results["plan"]
    accelerator = f", {where['accelerator']}" if where["accelerator"] else ""
    planned = f" There is no plan beside it: {plan.get('reason')}."
    if plan.get("stages"):
        planned = (
            f" Planned for {plan['gpu']}, as `scmini plan` does it; planned peaks count what CUDA "
            "itself takes, which the used ones leave out."
        )
    return (
        f"{page.duration(total)} in all stages together, on {page.cores(where['cores'])} of "
        f"{where['processor']} with {where['memory_gib']} GiB of memory{accelerator}. A stage that "
        f"an earlier run had finished counts with the time it took then.{planned}"
    )


def _own(rewards: Mapping[str, list[Reward]], name: str) -> list[float]:
    if name == wording.TARGETS:
        return [reward.target_reward for reward in next(iter(rewards.values()))]
    return [reward.reward for reward in rewards[name]]


def judging_note(inputs: Inputs) -> str:
    """What the judge's verdicts cost, over all methods; empty if there was no judge."""
    notes = [
        run_data.read_manifest(folder)["notes"]
        for key, folder in inputs.items()
        if key.startswith("judge:")
    ]
    if not (requests := sum(note.get("judge_requests", 0) for note in notes)):
        return ""
    tokens = [sum(n.get("judge_tokens", {}).get(side, 0) for n in notes) for side in ("in", "out")]
    usd = [note["judge_usd"] for note in notes if "judge_usd" in note]
    price = f", {sum(usd):,.2f} USD" if usd else ""
    size = f"{requests:,} requests, {tokens[0]:,} tokens in and {tokens[1]:,} out"
    return f" Judging took {size}{price}."
