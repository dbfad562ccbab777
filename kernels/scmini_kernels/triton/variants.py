"""Names for what the launchers compile, so that tests can compile it ahead of time."""

from __future__ import annotations

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One compiled form of a kernel, as a launcher asks for it on some card.

    Attributes:
        name: unique within the module, e.g. "forward/bf16/Dh128".
        kernel: the `triton.jit` function.
        signature: every run-time argument and its type: "*bf16", "*i32", "i32", "fp32".
        constants: every `tl.constexpr` argument and its value.
        divisible: run-time arguments known to be multiples of 16 (aligned pointers, strides), as
            the just-in-time compiler would find them.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        multiplies: whether it must run on the matrix units, as every tl.dot of bf16 or fp16 does;
            fp32 at full precision does not. Each is checked ahead of time.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    multiplies: bool = False


# Shared memory that one block may ask for, in bytes, by compute capability (CUDA C++ Programming
# Guide, table of technical specifications).
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
