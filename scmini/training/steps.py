"""A training run as a list of optimizer steps: which prompts, in which order, on which process."""

import math
from collections.abc import Sequence
from typing import ClassVar, Protocol, TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from scmini.sections import TrainingConfig
from scmini.seeding import rng
from scmini.training.batches import Group
from scmini.training.losses import Sums


class Objective(Protocol):
    """A loss over groups: see losses.py."""

    metrics: ClassVar[tuple[str, ...]]

    def weight(self, group: Group) -> int: ...

    def __call__(self, logps: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Sums]: ...


class Step(TypedDict):
    """One process's share of an optimizer step."""

    groups: list[Group]
    weight: float
    """Of all groups of the step, on all processes together."""
    idle: bool
    """The process has no prompt of its own in this step; what it gets counts nothing."""


class Steps(Dataset[Step]):
    """All optimizer steps of a run in order, each as this process's share of its prompts.

    The order of prompts in an epoch is drawn from (seed, epoch), so it does not depend on where a
    run was interrupted. The last step of an epoch has the prompts that are left.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        objective: Objective,
        config: TrainingConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.groups, self.objective, self.seed = groups, objective, seed
        self.rank, self.world_size = rank, world_size
        self.prompts_per_step = config.prompts_per_step
        self.per_epoch = math.ceil(len(groups) / config.prompts_per_step)
        steps = self.per_epoch * config.num_train_epochs
        self.total = max(1, math.ceil(steps - 1e-9))  # 10 * 1.1 is a little over 11
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, step: int) -> Step:
        epoch, number = divmod(step, self.per_epoch)
        order = self._order(epoch)[number * self.prompts_per_step :][: self.prompts_per_step]
        chosen = [self.groups[i] for i in order]
        weight = float(sum(self.objective.weight(group) for group in chosen))
        share = chosen[self.rank :: self.world_size]
        # Neighbours of one length: attention takes plain sequences of one length at once.
        share.sort(key=lambda group: group.num_tokens)
        return {"groups": share or chosen[:1], "weight": weight, "idle": not share}

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.groups)))
            rng(self.seed, "order of prompts", str(epoch)).shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch]
