"""The step of a training on prefix trees: gradients of a fixed number of prompts, in rows that fit.

Each process takes its share of the step's prompts and cuts it into micro-batches by one memory
knob. The loss is divided by the weight of the whole step (prompts for DPO, scored tokens for SFT),
so neither the cutting nor the number of processes changes the result beyond rounding.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments

from scmini.errors import DoesNotFit, ScminiError
from scmini.models.attention import sequence_logps
from scmini.models.memory import free, is_out_of_memory, say_lowered, too_large
from scmini.seeding import rng
from scmini.training import non_finite, pressure
from scmini.training.batches import Group, Microbatch, cut
from scmini.training.keeping import KeepingTrainer
from scmini.training.losses import Sums
from scmini.training.non_finite import Culprit
from scmini.training.pressure import Attempt, Outcome, Schedule
from scmini.training.steps import Objective, Step, Steps
from scmini_kernels import PrefixTree

SECONDS_BETWEEN_CHECKPOINTS = 900
"""A step of a 7B model can take minutes: `save_steps` of them are more than a crash should cost."""
LESS_MEMORY = (
    "gradient_checkpointing: true (which keeps the checkpoints); optim: paged_adamw_8bit, "
    "model.load_in_4bit: true, a smaller model.max_length or sft.lora_r (which begin anew)"
)


class TreeModule(nn.Module):
    """A model whose forward gives the log-probabilities of a forest's sequences.

    This, not the model inside, is what the Trainer wraps: DistributedDataParallel's hooks must see
    the whole computation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tree: PrefixTree) -> Tensor:
        """[S] log-probabilities in nats, of a forest on the model's device."""
        return sequence_logps(self.model, tree)


class TreeTrainer(KeepingTrainer):
    """transformers' Trainer over `Steps`: one item is one optimizer step.

    What is replaced: the data loader, the step, how checkpoints are written and read, and logging.
    Where a GPU's memory runs out in a step, the step is done again in smaller rows.

    Args:
        knob: most tokens of a packed row.
        key: the knob's name in the configuration, for messages.
        tokenizer: for the texts of prompts whose loss or gradient is not finite.
    """

    def __init__(
        self,
        module: TreeModule,
        args: TrainingArguments,
        objective: Objective,
        knob: int,
        *,
        key: str = "tokens_per_microbatch",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        one_gpu_per_process(args)
        super().__init__(module, args, objective.metrics)
        self.objective: Objective = objective
        self.schedule = Schedule(self._out / pressure.FILE, knob)
        self.overdue = False
        self._key, self._tokenizer = key, tokenizer
        self._attempt = Attempt()

    def get_train_dataloader(self) -> DataLoader:
        # Not through accelerate: a step already is this process's share.
        return DataLoader(
            cast(Steps, self.train_dataset), batch_size=1, collate_fn=lambda items: items[0]
        )

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Backward over this process's share; returns its loss times the number of processes.

        So that the mean over processes, which DDP and the Trainer take, is the loss of the step.

        Raises:
            DoesNotFit: a single sequence is too long for the GPU's memory.
            ScminiError: the loss is not finite.
        """
        model.train()  # every module below it: the model came from loading in eval mode
        while not self._try(model, inputs):
            pass
        step: Step = inputs
        loss = torch.stack(self._attempt.losses).sum()
        if not step["idle"]:
            self._add("prompts", len(step["groups"]))
            self._add("loss", loss.item() / step["weight"])
        self._add("steps", 1 / self.args.world_size)
        return loss * self._attempt.scale

    def _try(self, model: nn.Module, step: Step) -> bool:
        """One attempt at a step; False where nothing of it is left, but smaller rows are set.

        Several processes exchange gradients only after all of them are through, so that either all
        of them try again or none does.
        """
        scale = 0.0 if step["idle"] else self.args.world_size / step["weight"]
        knob = self.schedule.at(self.state.global_step)
        self._attempt = attempt = Attempt(step["groups"], scale, knob)
        sums = dict(self._sums)
        out_of_memory = False
        try:
            with self._apart(model):
                self._backward(model, cut(step["groups"], knob))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        # Only now is the traceback gone, and with it what the failed calls held.
        outcome = attempt.outcome(out_of_memory)
        worst, smallest, self.overdue = self._agreed(outcome, attempt.smaller())
        if worst is Outcome.NOT_FINITE:
            found = attempt.culprits(self.objective)
            self._stop("the loss", found, outcome is worst)
        if worst is not Outcome.FINE:
            model.zero_grad()
            attempt.losses, attempt.logps = [], []
            self._sums = sums
            free()
        if worst is Outcome.TOO_LARGE:
            raise self._does_not_fit(outcome is worst)
        if worst is Outcome.SMALLER:
            self._lower(smallest)
            return False
        if self.args.world_size > 1:
            self._exchange(model)
        return True

    def _backward(self, model: nn.Module, batches: Sequence[Microbatch]) -> None:
        self._seed()
        for batch in batches:
            run = self._backward_whole if batch.parts is None else self._backward_parts
            self._attempt.losses.append(run(model, batch, self._attempt.scale))

    def _backward_whole(self, model: nn.Module, batch: Microbatch, scale: float) -> Tensor:
        logps = model(self._to_device(batch.tree(), batch.groups))
        loss, metrics = self.objective(logps, batch.groups)
        self.accelerator.backward(loss * scale)
        self._attempt.logps.append((batch.groups, logps.detach()))
        self._add_metrics(metrics, scale)
        return loss.detach()

    def _backward_parts(self, model: nn.Module, batch: Microbatch, scale: float) -> Tensor:
        """An oversized group, exactly: its loss couples all sequences, so all are scored first.

        That fixes the weight dloss/dlogp of each; then the parts are back-propagated with them.
        """
        trees = [self._to_device(tree, batch.groups) for tree in batch.part_trees()]
        scores = []
        for number, tree in enumerate(trees):
            self._attempt.at(tree, batch.groups)
            self._seed(batch.groups[0].id, number)  # the second pass meets the same dropout
            with torch.no_grad():
                scores.append(self.accelerator.unwrap_model(model)(tree))
        leaf = torch.cat(scores).requires_grad_()
        loss, metrics = self.objective(leaf, batch.groups)
        (weights,) = torch.autograd.grad(loss * scale, leaf)
        for number, (tree, (start, stop)) in enumerate(zip(trees, batch.parts or (), strict=True)):
            self._attempt.at(tree, batch.groups)
            self._seed(batch.groups[0].id, number)
            logps = model(tree)
            self.accelerator.backward((logps * weights[start:stop]).sum())
        self._attempt.logps.append((batch.groups, leaf.detach()))
        self._add_metrics(metrics, scale)
        return loss.detach()

    def _seed(self, *names: str | int) -> None:
        """Random numbers (dropout) from the place in the run alone, so none need be saved."""
        place = (self.state.global_step, self.args.process_index, *names)
        torch.manual_seed(rng(self.args.seed, "dropout", *map(str, place)).getrandbits(63))

    def _apart(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients are added up in this process alone."""
        return self.accelerator.no_sync(model) if self.args.world_size > 1 else nullcontext()

    def _exchange(self, model: nn.Module) -> None:
        """Sum gradients over processes, by a backward that adds nothing and that DDP sees."""
        tokens = np.zeros(1, dtype=np.int64)
        tree = PrefixTree.pack([[(tokens, tokens)]]).to(self.args.device)
        self.accelerator.backward((model(tree) * 0.0).sum())

    def _agreed(self, outcome: Outcome, proposal: int) -> tuple[Outcome, int, bool]:
        """The worst outcome of all processes, the smallest knob, and whether to save by the clock.

        The clock is that of the first process.
        """
        overdue = self.seconds_since_checkpoint() > SECONDS_BETWEEN_CHECKPOINTS
        if self.args.world_size == 1:
            return outcome, proposal, overdue
        mine = torch.tensor([[outcome, proposal, overdue]], device=self.args.device)
        rows = self.accelerator.gather(mine).tolist()
        worst = Outcome(max(row[0] for row in rows))
        return worst, min(row[1] for row in rows if row[0] == worst), bool(rows[0][2])

    def _lower(self, tokens: int) -> None:
        """Smaller rows from this step on."""
        step = self.state.global_step
        if self.is_world_process_zero():
            say_lowered(self._key, self._attempt.knob, tokens, f"in step {step + 1}")
        self.schedule.lower(step, tokens, write=self.is_world_process_zero())

    def _does_not_fit(self, here: bool) -> DoesNotFit:
        where = f"in step {self.state.global_step + 1}"
        if not here:
            return DoesNotFit(
                f"another process ran out of GPU memory {where}; its message says why"
            )
        ids, row = self._attempt.ids, self._attempt.row
        return too_large(self._key, row, f"{where}, prompt {ids[0]!r}", LESS_MEMORY)

    def _to_device(self, tree: PrefixTree, groups: Sequence[Group]) -> PrefixTree:
        self._attempt.at(tree, groups)
        self._add("tokens", tree.num_tokens)
        return tree.to(self.args.device)

    def _add_metrics(self, metrics: Sums, scale: float) -> None:
        if metrics and scale:
            values = torch.stack([value.double() for value in metrics.values()]).tolist()
            for name, value in zip(metrics, values, strict=True):
                self._add(name, value)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            everyone = self._attempt.culprits(self.objective, everyone=True)
            ids = self._with_broken_gradients(model)
            found = [culprit for culprit in everyone if culprit.group.id in ids]
            outcome = Outcome.NOT_FINITE if found else Outcome.FINE
            worst = self._agreed(outcome, 0)[0]
            # Found in no process: single gradients are finite, and only their sum is not.
            self._stop("the gradient", found or everyone, outcome is worst)
        return norm

    def _with_broken_gradients(self, model: nn.Module) -> set[str]:
        """Prompts of this process's share whose own gradient is not finite.

        The weights still are those that the step began with, so each can be computed again.
        """
        done, found = self._attempt, set()
        for group in done.groups:
            model.zero_grad()
            self._attempt = Attempt(done.groups, done.scale, done.knob)
            with self._apart(model):
                self._backward(model, cut([group], done.knob))
            if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
                found.add(group.id)
        model.zero_grad()
        return found

    def _stop(self, what: str, found: Sequence[Culprit], here: bool) -> None:
        """The end of a run with numbers that are not finite; what made them so is written down."""
        step = self.state.global_step + 1
        if not here:
            raise ScminiError(f"{what} is not finite at step {step} in another process")
        rank = self.args.process_index
        path = self._out / (non_finite.FILE if not rank else f"log/non_finite-{rank}.json")
        rate = self.optimizer.param_groups[0]["lr"] if self.optimizer else self.args.learning_rate
        seen = f"See these prompts in {path}"
        try:
            non_finite.write(path, what, step, rate, found, self._tokenizer)
        except OSError as error:
            seen = f"Look at these prompts ({path} could not be written: {error})"
        ids = [culprit.group.id for culprit in found]
        shown = ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")
        raise ScminiError(
            f"{what} is not finite at step {step} (prompts: {shown}); nothing of this step was "
            f"kept. {seen}; if nothing is wrong with them, lower learning_rate, which makes it "
            "another training, from its first step"
        )


def one_gpu_per_process(args: TrainingArguments) -> None:
    """Where a single process sees several GPUs, transformers would wrap the model in DataParallel.

    That cuts batches along their first dimension, which a tree has not.
    """
    args._n_gpu = min(args.n_gpu, 1)
