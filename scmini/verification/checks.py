"""What a check is, how its errors are judged, and how checks are run one after another.

Errors are judged by budget: the largest error against fp64 (or the widest that fits) on the same
rounded inputs may be twice the error that plain PyTorch makes in the same dtype, or half a unit in
the last place of the largest value, which no dtype can avoid.
"""

import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scmini.errors import ScminiError

FACTOR = 2.0
MESSAGE_LENGTH = 300


class Finding(NamedTuple):
    """One quantity that was measured; errors in its own unit."""

    quantity: str
    error: float
    allowed: float


@dataclass(frozen=True)
class Check:
    """Something to measure.

    Attributes:
        name: what is compared with what.
        implementation: the implementation under test.
        dtype: its precision ("float32").
        measure: yields the findings. An exception fails the check.
        skip: why it cannot be done on this machine; empty if it can.
    """

    name: str
    implementation: str
    dtype: str
    measure: Callable[[], Iterable[Finding]]
    skip: str = ""


class Problem(NamedTuple):
    """What a function is tried on.

    Attributes:
        inputs: by name, in the dtype under test.
        upstream: random gradient of the output, of both signs.
        frozen: inputs that get no gradient.
    """

    inputs: dict[str, Tensor]
    upstream: Tensor
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        error: None where nothing could be measured, or what was measured is not a number.
        passed: None if the check was skipped.
        message: why it was skipped or what went wrong; empty otherwise.
    """

    name: str
    implementation: str
    dtype: str
    error: float | None
    allowed: float | None
    passed: bool | None
    message: str = ""


def run(
    checks: Sequence[Check], start: Callable[[Check], None], report: Callable[[Row], None]
) -> None:
    """Do all checks, whatever becomes of the ones before; `report` gets every row as it is known.

    Args:
        start: called before each check.
    """
    for check in checks:
        start(check)
        where = (check.implementation, check.dtype)
        if check.skip:
            report(Row(check.name, *where, None, None, None, check.skip))
            continue
        try:
            count = 0
            for finding in check.measure():
                report(_judged(check, finding))
                count += 1
            if count == 0:
                raise ScminiError("nothing was measured")
        except Exception as error:
            traceback.print_exc()
            report(Row(check.name, *where, None, None, False, _words(error)))


def _judged(check: Check, finding: Finding) -> Row:
    name = f"{check.name}: {finding.quantity}"
    finite = math.isfinite(finding.error) and math.isfinite(finding.allowed)
    return Row(
        name,
        check.implementation,
        check.dtype,
        finding.error if math.isfinite(finding.error) else None,
        finding.allowed if math.isfinite(finding.allowed) else None,
        finite and finding.error <= finding.allowed,
        "" if finite else f"not finite: error {finding.error}, allowed {finding.allowed}",
    )


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())[:MESSAGE_LENGTH]
    return text if isinstance(error, ScminiError) else f"{type(error).__name__}: {text}"


def within_budget(
    candidate: Callable[..., Tensor],
    plain: Sequence[Callable[..., Tensor]],
    problems: Sequence[Problem],
) -> Iterable[Finding]:
    """Errors of a function's output and of the gradient of every free input.

    Args:
        candidate: the fast way; called with the inputs of the first problem as keywords.
        plain: ways to write the same in plain PyTorch, in the dtype that they are given. The first,
            in fp64, is the truth; the largest error of any of them is the measure.
        problems: alike but for the numbers drawn. The maximum of one draw alone varies by a factor
            of two from seed to seed.
    """
    bounds: dict[str, float] = {}
    for problem in reversed(problems):
        wide = {name: x.double() for name, x in problem.inputs.items()}
        truth = _values(plain[0], problem._replace(inputs=wide))
        for way in plain:
            for name, value in _values(way, problem).items():
                bounds[name] = max(bounds.get(name, 0.0), allowed(value, truth[name]))
    ours = _values(candidate, problems[0])
    for name, bound in bounds.items():
        yield Finding(name, largest(ours[name], truth[name]), bound)


def _values(function: Callable[..., Tensor], problem: Problem) -> dict[str, Tensor]:
    inputs, upstream, frozen = problem
    leaves = {k: x.detach().clone().requires_grad_(k not in frozen) for k, x in inputs.items()}
    free = {name: leaf for name, leaf in leaves.items() if name not in frozen}
    out = function(**leaves)
    grads = torch.autograd.grad(out, list(free.values()), upstream.to(out.dtype))
    named = {f"gradient of {name}": grad for name, grad in zip(free, grads, strict=True)}
    return {"output": out.detach(), **named}


def largest(found: Tensor, exact: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape."""
    if found.shape != exact.shape:
        raise ScminiError(f"expected shape {tuple(exact.shape)}, got {tuple(found.shape)}")
    return (found.double() - exact.double()).abs().max().item()


def allowed(plain: Tensor, exact: Tensor) -> float:
    """The budget, from what plain PyTorch gives in the dtype under test."""
    floor = exact.abs().max().item() * torch.finfo(plain.dtype).eps / 2
    return max(FACTOR * largest(plain, exact), floor)
