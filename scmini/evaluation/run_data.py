"""What a report reads from finished stage folders: rewards, answers, curves and negatives.

`inputs` is the mapping that stages get: "data", "filter", "sample", and per method "reward:<m>",
"generate:<m>", "train:<m>". Folders that a run does not have are simply not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scmini.config import Config, is_trained_by_dpo
from scmini.data import zoo
from scmini.errors import DataError, StoreDamaged
from scmini.evaluation.win_rate import PERFECT
from scmini.records import (
    Generation,
    Message,
    Pair,
    Reward,
    read_generations,
    read_jsonl,
    read_pairs,
    read_rewards,
    read_samples,
    read_table,
)

Inputs = Mapping[str, Path]
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Candidate:
    """A sampled answer with its cosine similarity to the target."""

    text: str
    similarity: float


@dataclass(frozen=True)
class Contrast:
    """A training prompt: its target, answers taken as negatives, the most similar ones left out."""

    prompt: list[Message]
    target: str
    kept: list[Candidate]
    dropped: list[Candidate]


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
    methods: Sequence[str], inputs: Inputs, ids: Sequence[str]
) -> dict[str, list[Generation]]:
    """Answers of every method in the order of `ids`."""
    found = {}
    for method in methods:
        path = inputs[f"generate:{method}"] / "generations.jsonl"
        by_id = {generation.id: generation for generation in read_generations(path)}
        missing = [prompt_id for prompt_id in ids if prompt_id not in by_id]
        if missing:
            raise DataError(f"{path}: no answer to prompt {missing[0]!r}")
        found[method] = [by_id[prompt_id] for prompt_id in ids]
    return found


def training_facts(method: str, config: Config, inputs: Inputs) -> dict[str, Any]:
    """What a method was trained on: prompts, and for negatives their number and quality."""
    if not is_trained_by_dpo(method):
        section = config.sft_continued if method == "sft-continued" else config.sft
        rows = sum(1 for _ in read_jsonl(inputs["data"] / "train.jsonl"))
        return {"prompts": min(rows, section.num_prompts or rows)}
    pairs = read_trained_pairs(method, config, inputs)
    facts: dict[str, Any] = {"prompts": len(pairs)}
    if pairs:
        facts["effective_k"] = sum(len(pair.rejected) for pair in pairs) / len(pairs)
    if pairs and config.grader == "program":
        grades = [zoo.grade(last_user(p.prompt), text) for p in pairs for text in p.rejected]
        facts["perfect_share_of_negatives"] = float(np.mean(np.asarray(grades) >= PERFECT))
        facts["mean_reward_of_negatives"] = float(np.mean(grades))
    return facts


def read_trained_pairs(method: str, config: Config, inputs: Inputs) -> list[Pair]:
    """The pairs that a method was trained on."""
    path = inputs["filter"] / "pairs" / f"{method}.jsonl"
    return read_pairs(path)[: config.dpo.num_prompts]


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


def read_similarity(inputs: Inputs) -> dict[str, list[float | None]]:
    """Similarity to the target of every sampled answer, by prompt id; None for one not measured."""
    if "filter" not in inputs:
        return {}
    found: dict[str, list[float | None]] = {}
    for path in sorted((inputs["filter"] / "similarity").glob("part-*.parquet")):
        table = read_table(path)
        columns = (table.column(name).to_pylist() for name in ("id", "similarity"))
        found.update(zip(*columns, strict=True))
    return found


def split_by_use(
    similarity: Mapping[str, Sequence[float | None]], pairs: Sequence[Pair]
) -> tuple[list[float], list[float]]:
    """Similarities of answers taken as negatives, and of all others to the same prompts."""
    kept: list[float] = []
    others: list[float] = []
    for pair in pairs:
        taken = set(pair.response_index)
        for index, value in enumerate(similarity.get(pair.id, ())):
            if value is not None and np.isfinite(value):
                (kept if index in taken else others).append(float(value))
    return kept, others


def contrasts(
    pairs: Sequence[Pair],
    similarity: Mapping[str, Sequence[float | None]],
    inputs: Inputs,
    *,
    prompts: int,
    answers: int,
) -> list[Contrast]:
    """Training prompts to look at, evenly spaced over the file: nobody chose them.

    Args:
        pairs: of the method with most negatives.
        prompts: how many to show.
        answers: most negatives, and most answers left out, of each.
    """
    chosen = evenly(pairs, prompts)
    texts: dict[str, list[str]] = {}
    if "sample" in inputs:
        wanted = {pair.id for pair in chosen}
        for samples in read_samples(inputs["sample"]):
            if samples.id in wanted:
                texts[samples.id] = [response.text for response in samples.responses]
    found = []
    for pair in chosen:
        kept = [Candidate(*item) for item in zip(pair.rejected, pair.similarity, strict=True)]
        left_out = _left_out(pair, texts.get(pair.id, []), similarity.get(pair.id, []))
        found.append(Contrast(pair.prompt, pair.chosen, kept[:answers], left_out[:answers]))
    return found


def _left_out(
    pair: Pair, texts: Sequence[str], similarity: Sequence[float | None]
) -> list[Candidate]:
    """Different answers that were not taken and are not the target, most similar ones first."""
    best: dict[str, float] = {}
    for text, value in zip(texts, similarity, strict=False):
        shown = text.strip()
        if value is not None and shown and shown != pair.chosen.strip():
            best[shown] = max(value, best.get(shown, -1.0))
    for text in pair.rejected:
        best.pop(text.strip(), None)
    ordered = sorted(best.items(), key=lambda item: (-item[1], item[0]))
    return [Candidate(text, value) for text, value in ordered]


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances, the first among them; all where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
