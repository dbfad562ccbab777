"""Steps that are tried: what becomes of one, and which size of rows holds from which step on."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmini.models.memory import half_of
from scmini.store import write_atomic
from scmini.training.batches import Group
from scmini.training.non_finite import Culprit
from scmini.training.steps import Objective
from scmini_kernels import PrefixTree

FILE = "log/microbatch.json"


class Outcome(IntEnum):
    """How a process fared with its share of a step; the worst of all processes counts."""

    FINE = 0
    SMALLER = 1
    """A row did not fit, and can be cut."""
    TOO_LARGE = 2
    """A row did not fit that is one sequence."""
    NOT_FINITE = 3
    """The loss is not finite."""


@dataclass
class Attempt:
    """One attempt at a process's share of a step, and what it left.

    Attributes:
        groups: the share.
        scale: what the loss is multiplied by.
        knob: most tokens of a row.
        losses: of the micro-batches that are done, before the scale; 0-d.
        logps: of their sequences, [S] each, in nats.
        ids: prompts of the row that is worked on.
        row: its tokens. sequences: in it. largest: most tokens of a row so far.
    """

    groups: Sequence[Group] = ()
    scale: float = 0.0
    knob: int = 1
    losses: list[Tensor] = field(default_factory=list)
    logps: list[tuple[list[Group], Tensor]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    row: int = 0
    sequences: int = 0
    largest: int = 0

    def at(self, tree: PrefixTree, groups: Sequence[Group]) -> None:
        """A row is about to be computed."""
        self.ids = [group.id for group in groups]
        self.row, self.sequences = tree.num_tokens, tree.num_sequences
        self.largest = max(self.largest, self.row)

    def outcome(self, out_of_memory: bool) -> Outcome:
        """How it went; waits for the losses."""
        if out_of_memory:
            can_be_cut = self.sequences > 1 and self.knob > 1
            return Outcome.SMALLER if can_be_cut else Outcome.TOO_LARGE
        finite = bool(torch.stack(self.losses).isfinite().all())
        return Outcome.FINE if finite else Outcome.NOT_FINITE

    def smaller(self) -> int:
        """The knob to try next if memory ran out; surely less than that of this attempt."""
        return half_of(self.knob, self.largest)

    def culprits(self, objective: Objective, *, everyone: bool = False) -> list[Culprit]:
        """Prompts whose own loss is not finite (or every prompt), with their log-probabilities."""
        found = []
        for groups, logps in self.logps:
            sizes = [len(group.sequences) for group in groups]
            for group, own in zip(groups, logps.split(sizes), strict=True):
                loss = objective(own, [group])[0]
                found.append(Culprit(group, float(loss), own.tolist()))
        bad = [culprit for culprit in found if not math.isfinite(culprit.loss)]
        return found if everyone else bad or found


class Schedule:
    """`tokens_per_microbatch` of every step, on disk from the first change on.

    An interrupted training starts again a few steps before its end. It must neither meet the same
    lack of memory again nor cut those steps in another way than before, so the step of a change is
    kept with it. What was written under another configured value is not read: whoever sets a value
    gets it.
    """

    def __init__(self, path: Path, configured: int) -> None:
        self.path, self.configured = path, configured
        self.changes = self._read()

    def at(self, step: int) -> int:
        """Most tokens of a row in a step; steps count from 0."""
        return min([self.configured, *(tokens for first, tokens in self.changes if first <= step)])

    @property
    def lowered_to(self) -> int | None:
        """What the last step has; None if nothing ever changed."""
        return min(tokens for _, tokens in self.changes) if self.changes else None

    def lower(self, step: int, tokens: int, *, write: bool = True) -> None:
        """From `step` on, at most `tokens`."""
        self.changes.append((step, tokens))
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            row = {"tokens_per_microbatch": self.configured, "lowered": self.changes}
            write_atomic(self.path, json.dumps(row).encode())

    def _read(self) -> list[tuple[int, int]]:
        try:
            row: Any = json.loads(self.path.read_bytes())
            if row["tokens_per_microbatch"] != self.configured:
                return []
            return [(int(step), max(1, int(tokens))) for step, tokens in row["lowered"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # none yet; a broken one costs no more than running out of memory again
