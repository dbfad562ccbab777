"""What to do when a GPU's memory runs out: smaller rows, and the same work again.

Only a GPU's memory is meant. Where the machine's own memory runs out, smaller rows of tokens seldom
help, and the system may end the process at any moment.
"""

import gc

import torch

from scmini import console
from scmini.errors import DoesNotFit

_SIGNS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
"""How libraries say it whose errors are plain RuntimeErrors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def free() -> None:
    """Give what nothing refers to any more back to the GPU.

    Call it after the `except` block: until its end the error's traceback holds every tensor of the
    calls that failed.
    """
    gc.collect()  # modules and autograd graphs refer to one another in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say_lowered(key: str, old: int, new: int, where: str) -> None:
    """Warn that a knob was lowered, and how to have it so from the start."""
    console.warn(
        f"out of GPU memory {where}: {key} {old} -> {new}, and on it goes; results stay the same "
        f"beyond rounding. Set {key}={new} to start with it"
    )


def too_large(key: str, row: int, whose: str, instead: str) -> DoesNotFit:
    """The error for a row that cannot be cut any more.

    Args:
        key: of the knob.
        row: its tokens.
        whose: when, and of which prompt.
        instead: what to change.
    """
    return DoesNotFit(
        f"out of GPU memory {whose}: {row} tokens of one sequence alone, so a smaller {key} cannot "
        f"help. What is done so far is kept: close other programs that use the GPU and run again, "
        f"or set {instead}"
    )


class Knob:
    """A `tokens_per_microbatch` that becomes smaller where a GPU's memory runs out.

    Attributes:
        tokens: most tokens of a packed row now.
        configured: what it was at first.
        key: its name in the configuration, for messages.
    """

    def __init__(self, tokens: int, key: str = "tokens_per_microbatch") -> None:
        self.tokens = self.configured = tokens
        self.key = key

    @classmethod
    def of(cls, knob: "int | Knob") -> "Knob":
        """A number as a knob of its own; a knob as it is."""
        return knob if isinstance(knob, Knob) else cls(knob)

    @property
    def lowered_to(self) -> int | None:
        """What it is now, if that is less than what was configured."""
        return self.tokens if self.tokens < self.configured else None

    def halve(self, row: int, where: str) -> None:
        """Go on with less than the row that did not fit, and say so.

        Args:
            row: its tokens.
            where: in which work, for the message.
        """
        new = half_of(self.tokens, row)
        say_lowered(self.key, self.tokens, new, where)
        self.tokens = new


def half_of(knob: int, row: int) -> int:
    """What a knob becomes when a row of `row` tokens did not fit."""
    return max(1, min(knob, row) // 2)
