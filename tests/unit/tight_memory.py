"""A GPU that is too small, played on the CPU; also a process of several, run by test_pressure.py.

python tight_memory.py OUT     a training, and three with trouble in process 1 alone
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import train_process

from scmini.errors import ScminiError
from scmini.training.batches import Group
from scmini.training.tree_trainer import TreeModule


@contextmanager
def room_for(most: int, *, when: str = "forward", calls_before: int = 0) -> Iterator[list[int]]:
    """Rows of more than `most` tokens run out of memory; yields the tokens of every row so far.

    Args:
        when: "forward" or "backward".
        calls_before: so many forwards have room for anything.
    """
    rows: list[int] = []
    forward = TreeModule.forward

    def tight(self: TreeModule, tree: Any) -> torch.Tensor:
        rows.append(tree.num_tokens)
        fails = tree.num_tokens > most and len(rows) > calls_before
        if fails and when == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        logps = forward(self, tree)
        if fails and logps.requires_grad:
            logps.register_hook(run_out)
        return logps

    TreeModule.forward = tight  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        TreeModule.forward = forward  # type: ignore[method-assign]


def run_out(grad: torch.Tensor) -> None:
    """A backward that runs out of memory, in the words of a library."""
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def trainings(out: Path, rank: str) -> None:
    """Process 1 has no trouble, little room, too little, and a number that is not finite."""
    train_process.run(out / "two", "dpo", 25)
    with room_for(25 if rank == "1" else 10**9):
        train_process.run(out / "little", "dpo", 10_000)
    with room_for(5 if rank == "1" else 10**9):
        _end(out / "too-little", rank)
    finite = train_process.response_groups

    def broken(*arguments: Any) -> list[Group]:
        groups = finite(*arguments)
        for group in groups if rank == "1" else ():
            assert group.ref_logps is not None
            group.ref_logps[0] = float("nan")
        return groups

    train_process.response_groups = broken
    _end(out / "not-finite", rank)


def _end(out: Path, rank: str) -> None:
    try:
        train_process.run(out, "dpo", 10_000)
    except ScminiError as error:
        text = f"{type(error).__name__}: {error}"
        (out / f"message-{rank}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    trainings(Path(sys.argv[1]), os.environ["RANK"])
