"""Ways to get the log-probabilities of target tokens from hidden states, with a frozen head.

Each is a function of a `Problem` and its hidden states that returns logp (M,), or, for the whole
DPO loss of one pair (mode "dpo"), the loss. Gradients come from autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, Shape
from torch import Tensor

from scmini.seeding import rng
from scmini_kernels import PrefixTree, linear_logprob

BETA = 0.1
SAMPLED_ROWS = 64

Function = Callable[["Problem", Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Random inputs of a case: T hidden states of one prefix tree, M predicted tokens.

    Attributes:
        hidden, ref_hidden: (T, D), the policy's and the reference's.
        head: (V, D), frozen, scaled so that probabilities are as peaked as those of a model.
        upstream: (M,) gradient of the log-probabilities, of both signs.
    """

    tree: PrefixTree
    hidden: Tensor
    ref_hidden: Tensor
    head: Tensor
    upstream: Tensor

    @property
    def rows(self) -> Tensor:
        return self.tree.edge_rows

    @property
    def targets(self) -> Tensor:
        return self.tree.edge_targets

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        """For k = 1: the tree's rows of both sequences (2, P+R), and their labels, -100 if none.

        `labels[b, t]` is what row t predicts; both responses are equally long.
        """
        edges = self.tree.sequence_edges
        length = int(edges.offsets[1])
        both = edges.indices.view(2, length)
        prompt = int(self.rows[both[0, 0]]) + 1
        start = torch.arange(prompt - 1, device=self.rows.device).expand(2, -1)
        rows = torch.cat((start, self.rows[both]), dim=1)
        labels = torch.cat((torch.full_like(start, -100), self.targets[both]), dim=1)
        return rows, labels


def problem(shape: Shape, case: Case, device: str, dtype: torch.dtype) -> Problem:
    """One prompt of the case; hidden states of unit variance, logits of standard deviation 2."""
    draw = rng(0, "head", str(case), str(shape.vocab))
    firsts = draw.sample(range(shape.vocab), case.k + 1)
    prompt = [draw.randrange(shape.vocab) for _ in range(case.prompt)]
    responses = [
        [first, *(draw.randrange(shape.vocab) for _ in range(case.response - 1))]
        for first in firsts
    ]
    tree = PrefixTree.pack([[(prompt, response) for response in responses]]).to(device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    hidden, ref_hidden = (normal(tree.num_tokens, shape.hidden).to(dtype) for _ in range(2))
    head = (normal(shape.vocab, shape.hidden) * 2 * shape.hidden**-0.5).to(dtype)
    return Problem(tree, hidden, ref_hidden, head, normal(len(tree.edge_rows)))


def peers(
    mode: str, device: str, dtype: torch.dtype, k: int
) -> tuple[dict[str, Function], dict[str, str]]:
    """The implementations that can be measured here, and why the others cannot."""
    if mode == "dpo":
        return _dpo_peers(device, k)
    found: dict[str, Function] = {"scmini, PyTorch": partial(_ours, impl="torch")}
    absent: dict[str, str] = {}
    if dtype != torch.float32:
        found["PyTorch, 16-bit logits"] = partial(_plain, wide=False)
    found["PyTorch, fp32 logits"] = partial(_plain, wide=True)
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = _torch_fused
    else:
        absent["F.linear_cross_entropy"] = "needs torch 2.13"
    on_cuda: dict[str, tuple[str, Function]] = {
        "scmini, Triton": ("triton", partial(_ours, impl="triton")),
        "torch.compile": ("triton", _Compiled()),
        "Liger, reduction none": ("liger_kernel", _liger),
        "Cut Cross-Entropy": ("cut_cross_entropy", partial(_cce, filter_eps="auto")),
        "Cut Cross-Entropy, exact": ("cut_cross_entropy", partial(_cce, filter_eps=None)),
    }
    for name, (module, function) in on_cuda.items():
        if device != "cuda":
            absent[name] = "needs CUDA"
        elif not find_spec(module):
            absent[name] = f"{module} is not installed"
        else:
            found[name] = function
    return found, absent


def _dpo_peers(device: str, k: int) -> tuple[dict[str, Function], dict[str, str]]:
    if k != 1:
        return {}, {}
    found: dict[str, Function] = {"scmini, DPO of a pair": _our_dpo}
    if not find_spec("liger_kernel"):
        return found, {"Liger, DPO of a pair": "liger_kernel is not installed"}
    found["Liger, DPO of a pair"] = partial(_liger_dpo, compiled=device == "cuda")
    return found, {}


def floor(inputs: Problem, mode: str) -> None:
    """The bare products that nobody can do without: one to score, two to train."""
    hidden = inputs.hidden[inputs.rows]
    logits = hidden @ inputs.head.T
    if mode == "train":
        logits @ inputs.head


def _ours(inputs: Problem, hidden: Tensor, impl: Any) -> Tensor:
    return linear_logprob(hidden, inputs.head, inputs.rows, inputs.targets, impl=impl)


def _plain(inputs: Problem, hidden: Tensor, wide: bool) -> Tensor:
    logits = hidden[inputs.rows] @ inputs.head.T
    logps = (logits.float() if wide else logits).log_softmax(-1)
    return logps.gather(1, inputs.targets[:, None])[:, 0]


class _Compiled:
    """`_plain` under torch.compile, which is imported only when this is called."""

    def __init__(self) -> None:
        self.function: Any = None

    def __call__(self, inputs: Problem, hidden: Tensor) -> Tensor:
        if self.function is None:
            torch.compiler.reset()  # after some lengths dynamo would no longer compile
            self.function = torch.compile(_logps_of_rows, dynamic=False)
        logps: Tensor = self.function(hidden[inputs.rows], inputs.head, inputs.targets)
        return logps


def _logps_of_rows(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return (rows @ head.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _torch_fused(inputs: Problem, hidden: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    rows = hidden[inputs.rows]
    return -F.linear_cross_entropy(
        rows, inputs.head, inputs.targets, reduction="none", options=options
    )


def _liger(inputs: Problem, hidden: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return -loss(inputs.head, hidden[inputs.rows], inputs.targets)


def _cce(inputs: Problem, hidden: Tensor, filter_eps: str | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(
        hidden[inputs.rows],
        inputs.head,
        inputs.targets,
        reduction="none",
        filter_eps=filter_eps,
    )


def _our_dpo(inputs: Problem, hidden: Tensor) -> Tensor:
    tree = inputs.tree
    with torch.no_grad():
        ref = tree.sequence_logps(_ours(inputs, inputs.ref_hidden, "auto"))
    logratios = tree.sequence_logps(_ours(inputs, hidden, "auto")) - ref
    return -F.logsigmoid(BETA * (logratios[0] - logratios[1]))


def _liger_dpo(inputs: Problem, hidden: Tensor, compiled: bool) -> Tensor:
    """On both sequences with the prompt in each, as its interface wants."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    rows, labels = inputs.pair
    loss = LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled)
    result = loss(
        inputs.head,
        hidden[rows],
        labels,
        ref_input=inputs.ref_hidden[rows],
        ref_weight=inputs.head,
    )
    return result[0]


def errors(inputs: Problem, function: Function, mode: str) -> dict[str, float]:
    """Against fp64 on the same (rounded) inputs.

    `value`: the largest absolute error of a log-probability (or of the loss). `gradient`: relative
    error (Frobenius norm) of the gradient of the hidden states; not in mode "forward". For
    log-probabilities over some rows only, the last of the prompt among them: fp64 of all is large.
    """
    hidden = inputs.hidden.detach().requires_grad_(mode != "forward")
    out = function(inputs, hidden)
    if mode == "dpo":
        truth = _fp64(inputs)
        exact_hidden = truth.hidden.requires_grad_()
        exact = _our_dpo(truth, exact_hidden)
        exact.backward()
        out.backward()
        return {
            "value": abs(out.item() - exact.item()),
            "gradient": _relative(hidden.grad, exact_hidden.grad),
        }
    some = torch.linspace(0, len(inputs.rows) - 1, SAMPLED_ROWS, device=hidden.device).long()
    sampled = torch.unique(torch.cat((inputs.rows[some], inputs.rows.mode().values[None])))
    chosen = torch.isin(inputs.rows, sampled)
    exact_hidden = inputs.hidden[sampled].double().requires_grad_()
    logits = exact_hidden[torch.searchsorted(sampled, inputs.rows[chosen])] @ inputs.head.double().T
    exact = logits.log_softmax(-1).gather(1, inputs.targets[chosen, None])[:, 0]
    found = {"value": (out[chosen].double() - exact).abs().max().item()}
    if mode == "train":
        exact.backward(inputs.upstream[chosen].double())
        out.backward(inputs.upstream.to(out.dtype))
        found["gradient"] = _relative(hidden.grad[sampled], exact_hidden.grad)
    return found


def _fp64(inputs: Problem) -> Problem:
    return Problem(
        inputs.tree,
        inputs.hidden.detach().double(),
        inputs.ref_hidden.double(),
        inputs.head.double(),
        inputs.upstream.double(),
    )


def _relative(got: Tensor | None, exact: Tensor | None) -> float:
    assert got is not None
    assert exact is not None
    return ((got.double() - exact).norm() / exact.norm()).item()
