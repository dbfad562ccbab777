"""What a report reads from finished stage folders: rewards, answers, curves and negatives.

`inputs` is the mapping that stages get: "data", "filter", "sample", and per method "reward:<m>",
"generate:<m>", "train:<m>", for later iterations of SPIN also "filter:<m>". Folders that a run does
not have are simply not in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scmini.config import Config, is_trained_by_dpo, spin_iterations
from scmini.data import zoo
from scmini.data.negatives import FILTERED, SPIN, UNFILTERED
from scmini.data.selection import SIMILAR
from scmini.errors import DataError, RecordError, StoreDamaged
from scmini.evaluation.win_rate import PERFECT
from scmini.records import (
    Generation,
    Message,
    Pair,
    Reward,
    read_generations,
    read_jsonl,
    read_rewards,
    read_table,
)

Inputs = Mapping[str, Path]
Curve = list[tuple[float, float]]


BINS = np.linspace(-1, 1, 81)
"""Edges of the histograms of cosine similarities."""
CUT_QUANTILES = (0.1, 0.5, 0.9)
RULE_NAMES = {
    FILTERED: "self-contrast-k",
    UNFILTERED: "self-contrast-k-unfiltered",
    SPIN: "spin",
}
"""The rules of the filter, by the methods that use them."""


@dataclass(frozen=True)
class Similarities:
    """How similar to their targets the answers are, of the prompts that a method trains on.

    The arrays count answers in the 80 intervals of `BINS`.
    """

    taken: NDArray[np.int64]
    """Negatives of the method."""
    spared: NDArray[np.int64]
    """Candidates that were not drawn."""
    dropped: NDArray[np.int64]
    """Answers that are no candidates."""
    cut: tuple[float, float, float] | None
    """Where the least similar end and the too similar begin: the 10 %, 50 % and 90 % quantiles over
    prompts. None where no prompt has both kinds."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a finished stage folder."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreDamaged(f"{path}: {error}") from None
    if not isinstance(manifest, dict):
        raise StoreDamaged(f"{path}: expected a JSON object")
    return manifest


def read_all_rewards(methods: Sequence[str], inputs: Inputs) -> dict[str, list[Reward]]:
    """Rewards of every method, on the same prompts in the same order.

    Raises:
        DataError: a method was graded on other prompts than the first one.
    """
    found = {m: read_rewards(inputs[f"reward:{m}"] / "rewards.jsonl") for m in methods}
    expected = [reward.id for reward in found[methods[0]]]
    if not expected:
        raise DataError(f"{inputs[f'reward:{methods[0]}'] / 'rewards.jsonl'} is empty")
    for method, rewards in found.items():
        if [reward.id for reward in rewards] != expected:
            path = inputs[f"reward:{method}"] / "rewards.jsonl"
            raise DataError(f"{path}: its prompts are not those of {methods[0]}")
    return found


def read_all_generations(
    methods: Sequence[str], inputs: Inputs, ids: Sequence[str] | None = None
) -> dict[str, list[Generation]]:
    """Answers of every method in the order of `ids`, or of the first method's answers.

    Raises:
        DataError: a prompt has no answer, or there are no answers at all.
    """
    found = {}
    for method in methods:
        path = inputs[f"generate:{method}"] / "generations.jsonl"
        by_id = {generation.id: generation for generation in read_generations(path)}
        ids = list(by_id) if ids is None else ids
        if not ids:
            raise DataError(f"{path} is empty")
        missing = [prompt_id for prompt_id in ids if prompt_id not in by_id]
        if missing:
            raise DataError(f"{path}: no answer to prompt {missing[0]!r}")
        found[method] = [by_id[prompt_id] for prompt_id in ids]
    return found


def training_facts(method: str, config: Config, inputs: Inputs) -> dict[str, Any]:
    """What a method was trained on: prompts, and for negatives their number and quality.

    Of several iterations of SPIN it is the last one that is told of.
    """
    if not is_trained_by_dpo(method):
        section = config.sft_continued if method == "sft-continued" else config.sft
        rows = sum(1 for _ in read_jsonl(inputs["data"] / "train.jsonl"))
        return {"prompts": min(rows, section.num_prompts or rows)}
    prompts = negatives = 0
    grades: list[float] = []
    for pair in trained_pairs(method, config, inputs):
        prompts += 1
        negatives += len(pair.rejected)
        if config.grader == "program":
            grades += [zoo.grade(last_user(pair.prompt), text) for text in pair.rejected]
    facts: dict[str, Any] = {"prompts": prompts}
    if iterations := spin_iterations(method):
        facts["iterations"] = iterations
    if prompts:
        facts["effective_k"] = negatives / prompts
    if grades:
        facts["perfect_share_of_negatives"] = float(np.mean(np.asarray(grades) >= PERFECT))
        facts["mean_reward_of_negatives"] = float(np.mean(grades))
    return facts


def trained_pairs(method: str, config: Config, inputs: Inputs) -> Iterator[Pair]:
    """The pairs that a method was trained on, one in memory at a time."""
    folder = inputs.get(f"filter:{method}", inputs["filter"])
    path = folder / "pairs" / f"{method}.jsonl"
    for number, row in islice(read_jsonl(path), config.dpo.num_prompts):
        try:
            yield Pair(**row)
        except TypeError as error:
            raise RecordError(path, number, f"no pair ({error})") from None


def last_user(prompt: Sequence[Message]) -> str:
    """The last user message: what the demo's program grades an answer by."""
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")


def read_curves(folder: Path, keys: Mapping[str, str]) -> dict[str, Curve]:
    """Points (step, value) of metrics.jsonl by name; `keys` maps a metric to the name to show."""
    path = folder / "metrics.jsonl"
    curves: dict[str, Curve] = {name: [] for name in keys.values()}
    for _, row in read_jsonl(path) if path.exists() else ():
        for key, name in keys.items():
            if isinstance(row.get(key), (int, float)) and "step" in row:
                curves[name].append((row["step"], row[key]))
    return {name: points for name, points in curves.items() if points}


def read_rules(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """What each rule of the filter made of the answers, by the methods that use it.

    The values are those of the stage's notes.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in [key for key in inputs if key.partition(":")[0] == "filter"]:
        rules = read_manifest(inputs[key])["notes"].get("rules", {})
        round_of = key.partition(":")[2]
        found |= {round_of or RULE_NAMES[rule]: rules[rule] for rule in RULE_NAMES if rule in rules}
    return found


def similarities(taken: Mapping[str, Sequence[int]], inputs: Inputs) -> Similarities:
    """Histograms of the answers to the prompts in `taken`.

    Args:
        taken: by prompt id, the indices of the answers that became negatives.
    """
    counts = {kind: np.zeros(len(BINS) - 1, np.int64) for kind in ("taken", "spared", "dropped")}
    cuts = []
    for path in sorted((inputs["filter"] / "similarity").glob("part-*.parquet")):
        found: dict[str, list[float]] = {kind: [] for kind in counts}
        for id, values, reasons in similarity_rows(path):
            if id in taken:
                chosen = set(taken[id])
                for index, (value, reason) in enumerate(zip(values, reasons, strict=True)):
                    kind = "dropped" if reason else "taken" if index in chosen else "spared"
                    found[kind].append(value)
                if (cut := _cut(values, reasons)) is not None:
                    cuts.append(cut)
        for kind, of_kind in found.items():
            counts[kind] += np.histogram(np.asarray(of_kind, dtype=float), BINS)[0]
    quantiles = tuple(np.quantile(cuts, CUT_QUANTILES).tolist()) if cuts else None
    return Similarities(**counts, cut=quantiles)


def _cut(values: Sequence[float], reasons: Sequence[str | None]) -> float | None:
    """Midway between the most similar candidate and the least similar of the too similar."""
    rows = list(zip(values, reasons, strict=True))
    below = max((value for value, reason in rows if reason is None), default=None)
    above = min((value for value, reason in rows if reason == SIMILAR), default=None)
    return None if below is None or above is None else (below + above) / 2


def similarity_rows(path: Path) -> list[tuple[str, list[float], list[str | None]]]:
    """Of a shard of the filter: id, and similarities and reasons of the answers to each prompt."""
    table = read_table(path)
    columns = (table.column(name).to_pylist() for name in ("id", "similarity", "dropped"))
    return list(zip(*columns, strict=True))


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances, the first among them; all where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
