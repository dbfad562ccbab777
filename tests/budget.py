"""Errors judged by budget: against fp64 on the same inputs, in units of plain PyTorch's error."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def values_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor
) -> list[Tensor]:
    """[output, gradient of every input] for the upstream gradient, on detached copies."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_within_budget(
    candidate: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor,
    factor: float = 2.0,
) -> None:
    """Each output and gradient of `candidate` errs at most `factor` x as much as `plain`'s.

    Errors are maxima over the elements, against `plain` in fp64 on the same (rounded) inputs.
    """
    truth = values_and_gradients(plain, [x.double() for x in inputs], upstream.double())
    ours = values_and_gradients(candidate, inputs, upstream)
    theirs = values_and_gradients(plain, inputs, upstream)
    for index, (exact, got, peer) in enumerate(zip(truth, ours, theirs, strict=True)):
        # Half a unit in the last place of the largest value: what no dtype can avoid.
        floor = exact.abs().max().item() * torch.finfo(got.dtype).eps / 2
        allowed = max(factor * (peer.double() - exact).abs().max().item(), floor)
        error = (got.double() - exact).abs().max().item()
        what = "output" if index == 0 else f"gradient {index - 1}"
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
