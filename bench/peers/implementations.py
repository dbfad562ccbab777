"""The implementations that the step benchmark compares, and how the model is held: plain facts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from cases import Case, Layout, Shape, counts, step_flop


@dataclass(frozen=True)
class Setup:
    """How the model is held and run: the same for every implementation."""

    shape: Shape
    device: str
    quantised: bool
    """NF4 with double quantisation, computing in bfloat16, instead of float32."""
    checkpointing: bool
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.quantised else torch.float32

    @property
    def dtype_name(self) -> str:
        return "nf4, bfloat16" if self.quantised else "float32"


@dataclass(frozen=True)
class Implementation:
    """A way to take the step.

    Attributes:
        trainer: whose Trainer.
        layout: what it computes.
        at_once: what is in flight together: all pairs of one prompt, or one pair (for a split tree:
            as many tokens as one pair has).
        precomputed: the reference's log-probabilities are there before the step.
    """

    name: str
    trainer: Literal["scmini", "trl"]
    layout: Layout
    at_once: Literal["prompt", "pair"]
    precomputed: bool = False

    def knob(self, case: Case) -> int:
        """`tokens_per_microbatch` of ours: packed tokens of what is in flight together."""
        if self.at_once == "pair":
            return case.prompt + 2 * case.response
        if self.layout == "pairs":  # each pair is a group, and groups are counted as trees
            return case.k * (case.prompt + 2 * case.response)
        return case.prompt + (case.k + 1) * case.response

    def flop(self, setup: Setup, case: Case) -> int:
        """Work of one step as the implementation does it.

        TRL computes the logits of its policy three times. Off CUDA it does so at every position;
        on CUDA, by its Triton kernel, only where a response's token is predicted.
        """
        count = counts(case, self.layout)
        theirs = self.trainer == "trl"
        return step_flop(
            setup.shape,
            count,
            checkpointing=setup.checkpointing,
            reference=not self.precomputed,
            rescored=self.layout == "split",
            head_gemms=3 if theirs else 2,
            head_rows=count.tokens if theirs and setup.device == "cpu" else None,
        )


_BY_NAME = {
    each.name: each
    for each in (
        Implementation("trees", "scmini", "trees", "prompt"),
        Implementation("trees_split", "scmini", "split", "pair"),
        Implementation("grouped", "scmini", "grouped", "prompt"),
        Implementation("pairs", "scmini", "pairs", "prompt"),
        Implementation("pairs_one_pair", "scmini", "pairs", "pair"),
        Implementation("trl", "trl", "pairs", "prompt"),
        Implementation("trl_one_pair", "trl", "pairs", "pair"),
    )
}
_PRECOMPUTED = {
    f"{name}_precomputed": replace(_BY_NAME[name], name=f"{name}_precomputed", precomputed=True)
    for name in ("trees", "trl", "trl_one_pair")
}
IMPLEMENTATIONS = {**_BY_NAME, **_PRECOMPUTED}
