"""Prompts with their sequences as training examples, and how a step is cut to fit memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scmini_kernels import PrefixTree
from scmini_kernels.tree import ScoredSequence, SequenceLike

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Group:
    """A prompt with all its sequences: one training example.

    Attributes:
        id: of the prompt.
        sequences: what is scored. For DPO (prompt ids, response ids) with the chosen response first
            and k rejected ones after it; for SFT one sequence with a mask.
        num_scored: scored tokens of each sequence.
        ref_logps: of each sequence under the reference model, in nats; None for SFT.
    """

    id: str
    sequences: list[SequenceLike]
    num_scored: list[int]
    ref_logps: list[float] | None = None

    @cached_property
    def num_tokens(self) -> int:
        """Rows of the group's packed tree."""
        if len(self.sequences) == 1:
            only = self.sequences[0]
            return len(only.input_ids) if isinstance(only, ScoredSequence) else sum(map(len, only))  # type: ignore[arg-type]
        return PrefixTree.count_tokens(self.sequences)

    @classmethod
    def of_text(cls, id: str, ids: Sequence[int], scored: Sequence[bool]) -> "Group":
        """SFT: one sequence, of whose tokens those marked in `scored` are learned."""
        mask = np.asarray(scored, dtype=np.bool_)
        sequence = ScoredSequence(np.asarray(ids, dtype=np.int64), mask)
        return cls(id, [sequence], [int(mask.sum())])

    @classmethod
    def of_responses(
        cls,
        id: str,
        prompt: Sequence[int],
        responses: Sequence[Sequence[int]],
        ref_logps: list[float] | None = None,
    ) -> "Group":
        """DPO and scoring: responses to one prompt, the chosen one first."""
        shared = np.asarray(prompt, dtype=np.int64)
        sequences: list[SequenceLike] = [
            (shared, np.asarray(response, dtype=np.int64)) for response in responses
        ]
        return cls(id, sequences, [len(response) for response in responses], ref_logps)


@dataclass(frozen=True, eq=False)
class Microbatch:
    """What is computed at once: whole groups, or one oversized group in parts.

    `parts` is None, or the [start, stop) ranges of the sequences of the only group; they are
    computed one after another and together they are the whole group.
    """

    groups: list[Group]
    parts: list[tuple[int, int]] | None = None

    def tree(self) -> PrefixTree:
        """The forest of whole groups."""
        return PrefixTree.pack([group.sequences for group in self.groups])

    def part_trees(self) -> list[PrefixTree]:
        """One tree per part of the oversized group."""
        sequences = self.groups[0].sequences
        return [PrefixTree.pack([sequences[a:b]]) for a, b in self.parts or ()]


def cut(groups: Sequence[Group], tokens_per_microbatch: int) -> list[Microbatch]:
    """Cut an optimizer step into micro-batches of at most `tokens_per_microbatch` packed tokens.

    Order is kept. A group that is larger by itself becomes a micro-batch of its own, in parts: the
    prompt with some of the sequences each. A single sequence is never cut, so a part may exceed the
    limit if one sequence does.
    """
    batches: list[Microbatch] = []
    waiting: list[Group] = []
    filled = 0

    def flush() -> None:
        nonlocal waiting, filled
        if waiting:
            batches.append(Microbatch(waiting))
        waiting, filled = [], 0

    for group in groups:
        if filled + group.num_tokens > tokens_per_microbatch:
            flush()
        if group.num_tokens > tokens_per_microbatch and len(group.sequences) > 1:
            batches.append(Microbatch([group], _parts(group.sequences, tokens_per_microbatch)))
            continue
        waiting.append(group)
        filled += group.num_tokens
    flush()
    return batches


def _parts(sequences: Sequence[SequenceLike], limit: int) -> list[tuple[int, int]]:
    parts, start = [], 0
    for stop in range(1, len(sequences) + 1):
        if stop - start > 1 and PrefixTree.count_tokens(sequences[start:stop]) > limit:
            parts.append((start, stop - 1))
            start = stop - 1
    return [*parts, (start, len(sequences))]
