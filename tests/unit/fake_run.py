"""Finished stage folders with made-up numbers, as the stage `report` meets them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from scmini.config import Config, num_negatives
from scmini.data.selection import BLANK, SIMILAR, TRUNCATED
from scmini.records import (
    Generation,
    Pair,
    Response,
    Reward,
    Samples,
    write_jsonl,
    write_samples,
    write_table,
)

METHODS = (
    *("sft", "sft-continued", "sft-temperature-0.3", "dpo"),
    *("self-contrast-1", "self-contrast-4", "self-contrast-16", "self-contrast-16-unfiltered"),
)
STRENGTH = {
    **{"sft": 0.80, "sft-continued": 0.79, "sft-temperature-0.3": 0.995, "dpo": 0.88},
    **{"self-contrast-1": 0.85, "self-contrast-4": 0.875, "self-contrast-16": 0.89},
    "self-contrast-16-unfiltered": 0.87,
}
TARGETS = 0.84
NOTES = {
    "embed": {"long_share": 0.0417},
    "filter": {
        "rules": {
            "filtered": {
                **{"prompts": 20, "answers": 640, "kept": 480},
                "dropped": {BLANK: 20, TRUNCATED: 20, SIMILAR: 120},
            },
            "unfiltered": {
                **{"prompts": 20, "answers": 640, "kept": 600},
                "dropped": {BLANK: 20, TRUNCATED: 20},
            },
        }
    },
}
EVIL = '<script>alert("x")</script>\x1b[31m\u202e evil'


def config(methods: Sequence[str] = METHODS, **sections: Any) -> Config:
    return Config.model_validate(
        {
            **{"name": "demo", "methods": list(methods), "seed": 1},
            "sample": {"n": 32},
            "report": {"bootstrap_samples": 200},
            **sections,
        }
    )


def grade(rng: random.Random, mean: float) -> float:
    """A grade between 0 and 1 with many ones, as the demo's program gives."""
    return 1.0 if rng.random() < 2 * mean - 1 else round(rng.uniform(0, 1), 4)


def stage_folders(
    root: Path, config: Config, prompts: int = 80, answer: str = "The goose:\n- says honk"
) -> dict[str, Path]:
    """All inputs of the stage `report`."""
    inputs = {}
    for number, stage in enumerate(("data", "sft", "sample", "embed", "filter", "reference")):
        inputs[stage] = root / stage
        _manifest(inputs[stage], stage, None, 10.0 * number)
    write_jsonl(inputs["data"] / "train.jsonl", [{"id": f"t{i}"} for i in range(300)])
    for method in config.methods:
        for key, stage in (("train", "dpo"), ("generate", "generate"), ("reward", "reward")):
            inputs[f"{key}:{method}"] = root / f"{stage}-{method}"
            _manifest(inputs[f"{key}:{method}"], stage, method, 7.5)
        _answers(inputs, method, prompts, answer)
        _metrics(inputs[f"train:{method}"] / "metrics.jsonl", method)
        if num_negatives(method) or method == "dpo":
            _pairs(inputs["filter"] / "pairs" / f"{method}.jsonl", method)
    _samples(inputs)
    return inputs


def _manifest(folder: Path, stage: str, method: str | None, seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "recipe": {"stage": stage, "method": method},
        **{"seconds": seconds, "finished": "2025-01-01T00:00:00Z", "counts": {}},
        "notes": {"peak_gib": 0.51} if stage in ("sft", "dpo") else {},
    }
    if stage in NOTES:
        manifest["notes"] = NOTES[stage]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _prompt(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{number}. Tell me the sound of the goose. Use bullets."}]


def _answers(inputs: dict[str, Path], method: str, prompts: int, answer: str) -> None:
    run = inputs["data"].parent.name
    rng, target_rng = random.Random(f"{run} {method}"), random.Random(run)
    rewards, generations = [], []
    for i in range(prompts):
        target = grade(target_rng, TARGETS)
        rewards.append(Reward(f"p{i}", grade(rng, STRENGTH.get(method, 0.8)), target))
        generations.append(Generation(f"p{i}", _prompt(i), f"{answer} ({method})", "It says honk."))
    write_jsonl(inputs[f"reward:{method}"] / "rewards.jsonl", rewards)
    write_jsonl(inputs[f"generate:{method}"] / "generations.jsonl", generations)


def _metrics(path: Path, method: str) -> None:
    rows = []
    for step in range(1, 33):
        row = {"step": step, "loss": 0.7 - 0.004 * step + 0.01 * (step % 3)}
        if "contrast" in method or method == "dpo":
            row["rewards/margins"] = 0.012 * step
        rows.append(row)
    write_jsonl(path, rows)


def _pairs(path: Path, method: str) -> None:
    k = num_negatives(method) or 1
    first = -2 if method == "dpo" else 0
    rows = []
    for i in range(20):
        taken = min(k, 14)
        texts = [f"The goose says {'moo' if j % 5 else 'oink'} {j}." for j in range(taken)]
        similarity = [0.2 + 0.03 * j for j in range(taken)]
        indices = [first - j if first else j for j in range(taken)]
        rows.append(Pair(f"t{i}", _prompt(i), "It says honk.", texts, similarity, indices))
    write_jsonl(path, rows)


def _samples(inputs: dict[str, Path]) -> None:
    rows, similarity = [], []
    for i in range(20):
        texts = [f"The goose says {'moo' if j % 5 else 'oink'} {j}." for j in range(30)]
        responses = [Response(text, [1, 2], "stop") for text in [*texts, " ", EVIL]]
        rows.append(Samples(f"t{i}", [1], responses))
        similarity.append([0.2 + 0.024 * j + 0.002 * i for j in range(30)] + [0.0, 0.95])
    write_samples(inputs["sample"] / "part-00000.parquet", rows)
    reasons = [None] * 24 + [SIMILAR] * 6 + [BLANK, TRUNCATED]
    table = pa.table(
        {
            "id": [row.id for row in rows],
            "similarity": similarity,
            "dropped": pa.array([reasons for _ in rows], pa.list_(pa.string())),
        }
    )
    write_table(inputs["filter"] / "similarity" / "part-00000.parquet", table)
