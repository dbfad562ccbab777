"""What is left behind when a loss or a gradient is not finite: the prompts that made it so."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmini.store import write_atomic
from scmini.training.batches import Group
from scmini.training.example import marked
from scmini_kernels.tree import ScoredSequence

FILE = "log/non_finite.json"
KEPT = 20
"""Prompts that are written out; with seventeen long answers each these are a few megabytes."""


@dataclass(frozen=True)
class Culprit:
    """A prompt without whose share the number would be finite (or that may be such a one).

    Attributes:
        loss: its own, in nats.
        logps: of its sequences, in nats, in this very step.
    """

    group: Group
    loss: float
    logps: list[float]


def write(
    path: Path, what: str, step: int, learning_rate: float, found: Sequence[Culprit], tokenizer: Any
) -> None:
    """Write the prompts with their log-probabilities, token ids and texts.

    Numbers that are not finite are the strings "nan", "inf" and "-inf".

    Args:
        what: is not finite: "the loss" or "the gradient".
        step: counted from 1.
        tokenizer: None leaves the texts out.
    """
    row = {
        "not_finite": what,
        "step": step,
        "learning_rate": learning_rate,
        "number_of_prompts": len(found),
        "prompts": [_prompt(culprit, tokenizer) for culprit in found[:KEPT]],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(row, ensure_ascii=False, indent=1, allow_nan=False)
    write_atomic(path, text.encode(errors="backslashreplace"))  # lone surrogates become escapes


def _prompt(culprit: Culprit, tokenizer: Any) -> dict[str, Any]:
    group = culprit.group
    references: list[float] | list[None] = group.ref_logps or [None] * len(group.sequences)
    sequences = []
    for sequence, length, logp, reference in zip(
        group.sequences, group.num_scored, culprit.logps, references, strict=True
    ):
        prompt, learned = _split(sequence)
        row = {"logp": _number(logp), "num_tokens": length}
        if reference is not None:
            row["reference_logp"] = _number(reference)
        sequences.append(row | _shown(learned, tokenizer))
    return {
        "id": group.id,
        "loss": _number(culprit.loss),
        "prompt": _shown(prompt, tokenizer),
        "sequences": sequences,
    }


def _split(sequence: Any) -> tuple[list[int], list[int]]:
    """Ids that are read, and those that are learned (from the first of them to the end)."""
    if not isinstance(sequence, ScoredSequence):
        return [int(token) for token in sequence[0]], [int(token) for token in sequence[1]]
    ids = [int(token) for token in sequence.input_ids]
    first = next((n for n, scored in enumerate(sequence.scored) if scored), len(ids))
    return ids[:first], ids[first:]


def _shown(ids: list[int], tokenizer: Any) -> dict[str, Any]:
    text = {} if tokenizer is None else {"text": marked(tokenizer, ids)}
    return {"token_ids": ids} | text


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)
