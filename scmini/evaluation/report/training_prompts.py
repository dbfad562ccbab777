"""Training prompts to look at: what the model answered, what became a negative, what was dropped.

All methods that train on pairs are put together: each names its negatives among the same answers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from scmini.config import Config, is_trained_by_dpo
from scmini.data.answers import read_answers
from scmini.data.selection import REASONS
from scmini.evaluation.report import wording
from scmini.evaluation.report.run_data import Inputs, similarity_rows, trained_pairs
from scmini.records import Message, Pair, read_table


@dataclass(frozen=True)
class Answer:
    """An answer to a training prompt."""

    text: str
    similarity: float | None = None
    """Cosine to the target; None where the answer was not embedded."""
    reason: str | None = None
    """Why it is no candidate under the section `filter` (`scmini.data.selection.REASONS`)."""


@dataclass
class TrainingPrompt:
    """A prompt with its target, its answers, and each method's negatives among them.

    Attributes:
        num_answers: sampled ones, which come first in `answers`; behind them stand answers of
            other origin: the data set's rejected ones, and those of later rounds of SPIN.
        taken: method -> indices into `answers`.
    """

    id: str
    prompt: list[Message]
    target: str
    answers: list[Answer]
    num_answers: int
    taken: dict[str, list[int]] = field(default_factory=dict)

    def others(self, method: str) -> list[Answer]:
        """Sampled answers that the method did not take."""
        taken = set(self.taken[method])
        return [a for i, a in enumerate(self.answers[: self.num_answers]) if i not in taken]

    @property
    def num_candidates(self) -> int:
        """Sampled answers that the section `filter` lets pass."""
        return sum(answer.reason is None for answer in self.answers[: self.num_answers])


def paired_methods(config: Config) -> list[str]:
    """Methods that train on pairs, the one with most negatives first."""
    methods = [method for method in config.methods if is_trained_by_dpo(method)]
    return sorted(methods, key=lambda method: method != wording.main_method(methods))


def training_prompts(
    ids: Collection[str], methods: Sequence[str], config: Config, inputs: Inputs
) -> list[TrainingPrompt]:
    """The prompts named, in the order of the pairs of the first method.

    Args:
        ids: of prompts that the first method is trained on.
        methods: whose negatives to show.
    """
    sampled = dict(_sampled(ids, inputs))
    found: dict[str, TrainingPrompt] = {}
    for method in methods:
        shares_answers = f"filter:{method}" not in inputs
        for pair in trained_pairs(method, config, inputs):
            if pair.id not in ids:
                continue
            if pair.id not in found:
                answers = sampled.get(pair.id, [])
                found[pair.id] = TrainingPrompt(
                    pair.id, pair.prompt, pair.chosen, list(answers), len(answers)
                )
            _take(found[pair.id], method, pair, shares_answers=shares_answers)
    return list(found.values())


def _take(prompt: TrainingPrompt, method: str, pair: Pair, *, shares_answers: bool) -> None:
    """Put down a method's negatives; those that are no shared answers are added to them."""
    indices = []
    for index, text in zip(pair.response_index, pair.rejected, strict=True):
        if shares_answers and 0 <= index < prompt.num_answers:
            indices.append(index)
        else:
            indices.append(len(prompt.answers))
            prompt.answers.append(Answer(text))
    prompt.taken[method] = indices


def _sampled(ids: Collection[str], inputs: Inputs) -> Iterator[tuple[str, list[Answer]]]:
    """The sampled answers to each prompt, in the order in which they were drawn."""
    for path in _shards(inputs):
        if not any(id in ids for id in read_table(path, ["id"]).column("id").to_pylist()):
            continue
        beside = inputs["filter"] / "similarity" / path.name
        rows = similarity_rows(beside) if beside.is_file() else []
        judged = {id: (values, reasons) for id, values, reasons in rows}
        for row in read_answers(path):
            if row.id in ids:
                values, reasons = judged.get(row.id, ([], []))
                yield row.id, [Answer(*x) for x in zip_longest(row.texts, values, reasons)]


def _shards(inputs: Inputs) -> Iterable[Path]:
    return sorted(inputs["sample"].glob("part-*.parquet")) if "sample" in inputs else ()


def of_every_reason(answers: Iterable[Answer]) -> list[Answer]:
    """The dropped ones: one of each reason in turn, most similar first.

    No text comes twice for the same reason.
    """
    by_reason: Mapping[str, list[Answer]] = {reason: [] for reason in reversed(REASONS)}
    dropped = [answer for answer in answers if answer.reason is not None]
    for answer in sorted(dropped, key=lambda answer: -(answer.similarity or 0.0)):
        seen = by_reason[str(answer.reason)]
        if answer.text.strip() not in {other.text.strip() for other in seen}:
            seen.append(answer)
    rounds = zip_longest(*by_reason.values())
    return [answer for one_of_each in rounds for answer in one_of_each if answer is not None]
