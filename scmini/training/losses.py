"""The losses: plain functions of sequence log-probabilities.

Notation for one prompt with the chosen response 0 and k rejected responses 1..k:

    logratio_j = logp_j - ref_logp_j             nats, sums over the response's tokens
    reward_j   = beta * logratio_j
    margin_j   = reward_0 - reward_j

Every loss is a mean over the k rejected responses of its prompt, and a sum over prompts: who calls
divides by the number of prompts of the whole optimizer step, so that cutting a step into parts
changes nothing. Prompts may have different k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from scmini.errors import ScminiError
from scmini.sections import DPOConfig
from scmini.training.batches import Group

Sums = dict[str, Tensor]
"""Metrics as sums over prompts."""


def sigmoid_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -log sigmoid(margin) (Rafailov et al., arXiv 2305.18290, equation 7), element-wise.

    With label smoothing e, -(1 - e) log sigmoid(margin) - e log sigmoid(-margin): conservative DPO,
    for preferences that are flipped with probability e.
    """
    loss = -F.logsigmoid(margins)
    if label_smoothing:
        return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margins)
    return loss


def ipo_loss(margins: Tensor, beta: float) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2 of h = margin / beta, the difference of logratios, element-wise.

    Azar et al., arXiv 2310.12036, equation 17, with sums over tokens as there (TRL takes means).
    """
    return (margins / beta - 1 / (2 * beta)).square()


def hinge_loss(margins: Tensor) -> Tensor:
    """SLiC on log-ratios: max(0, 1 - margin) (Zhao et al., arXiv 2305.10425), element-wise."""
    return F.relu(1 - margins)


def softmax_loss(chosen: Tensor, rejected: Tensor, valid: Tensor) -> Tensor:
    """One softmax over the chosen and all k rejected: log sum_j exp(reward_j) - reward_0.

    With k = 1 this is `sigmoid_loss`. (Softmax-DPO, Chen et al., arXiv 2406.09215.)

    Args:
        chosen: [B] rewards. rejected: [B, K] rewards. valid: [B, K] bool.

    Returns:
        [B], one per prompt.
    """
    rewards = torch.cat((chosen[:, None], rejected.masked_fill(~valid, float("-inf"))), dim=1)
    return rewards.logsumexp(dim=1) - chosen


@dataclass(frozen=True)
class PreferenceObjective:
    """DPO and its relatives, by `dpo.loss_type`, with an optional SFT term on the chosen."""

    beta: float
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    metrics: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/accuracies_all",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logps/chosen_per_token",
        "drift/chosen_per_token",
        "drift/rejected_per_token",
        "kl/rejected",
    )

    @classmethod
    def of(cls, config: DPOConfig) -> "PreferenceObjective":
        return cls(config.beta, config.loss_type, config.label_smoothing, config.rpo_alpha)

    def weight(self, group: Group) -> int:
        """What a group counts in the step's mean: a prompt."""
        return 1

    def __call__(self, logps: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Sums]:
        """Loss and metrics, summed over prompts.

        Args:
            logps: [S] log-probabilities of the groups' sequences in order, in nats.
            groups: B groups, each with reference log-probabilities and at least one rejected.

        Returns:
            The loss (0-d) and the metrics under TRL's names: `rewards/rejected` and
            `logps/rejected` are means over k; `rewards/accuracies` is the share of (chosen,
            rejected) pairs with a positive margin, `rewards/accuracies_all` the share of prompts
            whose chosen response beats all k.

            Ours: `logps/chosen_per_token`, the chosen's log-probability over its tokens;
            `drift/...`, logratio over tokens; `kl/rejected`, the mean of -logratio over the
            rejected, in nats per response. For plain samples of the reference that would be the
            unbiased estimate of KL(reference || policy). Rejected ones that were picked, and that
            training makes unlikely, put it above that as a rule; for rejected ones that the
            reference did not write it is no KL at all.
        """
        index, valid = _layout(groups, logps.device)
        logratios = logps - _ref_logps(groups, logps)
        rewards = (self.beta * logratios)[index]
        chosen, rejected = rewards[:, 0], rewards[:, 1:]
        share = valid.to(logps) / valid.sum(dim=1, keepdim=True)
        margins = chosen[:, None] - rejected
        if self.loss_type == "softmax":
            losses = softmax_loss(chosen, rejected, valid)
        else:
            losses = (self._pair_loss(margins) * share).sum(dim=1)
        lengths = torch.tensor([n for group in groups for n in group.num_scored]).to(logps)[index]
        if self.rpo_alpha:
            losses = losses - self.rpo_alpha * logps[index[:, 0]] / lengths[:, 0]
        with torch.no_grad():
            metrics = _metrics(rewards, logps[index], valid, share)
            metrics |= _drift(logratios[index], logps[index[:, 0]], lengths, share)
        return losses.sum(), metrics

    def _pair_loss(self, margins: Tensor) -> Tensor:
        if self.loss_type == "sigmoid":
            return sigmoid_loss(margins, self.label_smoothing)
        if self.loss_type == "ipo":
            return ipo_loss(margins, self.beta)
        assert self.loss_type == "hinge", self.loss_type
        return hinge_loss(margins)


@dataclass(frozen=True)
class SFTObjective:
    """Cross-entropy, averaged over the scored tokens of the whole optimizer step.

    So long answers weigh more than short ones, as in transformers and TRL.
    """

    metrics: ClassVar[tuple[str, ...]] = ()

    def weight(self, group: Group) -> int:
        """What a group counts in the step's mean: its scored tokens."""
        return sum(group.num_scored)

    def __call__(self, logps: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Sums]:
        """Negative log-likelihood in nats, summed over tokens; no metrics of its own."""
        return -logps.sum(), {}


def _layout(groups: Sequence[Group], device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, 1 + K] index of each group's sequences, and [B, K] which of the rejected ones exist.

    Missing ones point to the chosen sequence: a harmless number with a gradient of zero.
    """
    counts = [len(group.sequences) for group in groups]
    if min(counts) < 2:
        culprit = groups[counts.index(min(counts))]
        raise ScminiError(f"prompt {culprit.id!r} has no rejected response")
    sizes = torch.tensor(counts)
    starts = sizes.cumsum(0) - sizes
    columns = torch.arange(int(sizes.max()))
    exists = columns < sizes[:, None]
    index = starts[:, None] + torch.where(exists, columns, 0)
    return index.to(device), exists[:, 1:].to(device)


def _ref_logps(groups: Sequence[Group], logps: Tensor) -> Tensor:
    values: list[float] = []
    for group in groups:
        if group.ref_logps is None:
            raise ScminiError(f"prompt {group.id!r} has no reference log-probabilities")
        values += group.ref_logps
    return torch.tensor(values, dtype=torch.float64).to(logps)


def _metrics(rewards: Tensor, logps: Tensor, valid: Tensor, share: Tensor) -> Sums:
    wins = (rewards[:, :1] > rewards[:, 1:]) & valid
    rejected = (rewards[:, 1:] * share).sum()
    chosen = rewards[:, 0].sum()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (wins * share).sum(),
        "rewards/accuracies_all": (wins | ~valid).all(dim=1).float().sum(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[:, 0].sum(),
        "logps/rejected": (logps[:, 1:] * share).sum(),
    }


def _drift(logratios: Tensor, chosen: Tensor, lengths: Tensor, share: Tensor) -> Sums:
    """Distance from the reference: logratios [B, 1 + K], chosen [B] logps, lengths [B, 1 + K]."""
    per_token = logratios / lengths
    return {
        "logps/chosen_per_token": (chosen / lengths[:, 0]).sum(),
        "drift/chosen_per_token": per_token[:, 0].sum(),
        "drift/rejected_per_token": (per_token[:, 1:] * share).sum(),
        "kl/rejected": -(logratios[:, 1:] * share).sum(),
    }
