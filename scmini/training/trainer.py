"""Training on prefix trees: transformers' Trainer with another idea of a step.

One optimizer step is a fixed number of prompts. Each process takes its share of them and cuts it
into micro-batches by one memory knob. The loss is divided by the weight of the whole step (prompts
for DPO, scored tokens for SFT), so neither the cutting nor the number of processes changes the
result beyond rounding.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from scmini import console
from scmini.errors import DataError, EnvironmentProblem, ScminiError
from scmini.models.attention import sequence_logps
from scmini.sections import TrainingConfig
from scmini.seeding import rng
from scmini.training import checkpoints
from scmini.training.batches import Group, Microbatch, cut
from scmini.training.losses import Sums
from scmini.training.steps import Objective, Step, Steps
from scmini_kernels import PrefixTree

METRICS = "metrics.jsonl"
KEPT_CHECKPOINTS = 2
OPTIMIZERS = {"adamw_torch": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}
"""Names of the configuration that transformers spells otherwise; fused is the same algorithm."""


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


class TreeTrainer(Trainer):
    """transformers' Trainer over `Steps`: one item is one optimizer step.

    What is replaced: the data loader, the step, how checkpoints are written and read, and logging.
    """

    def __init__(
        self, module: TreeModule, args: TrainingArguments, objective: Objective, knob: int
    ) -> None:
        one_gpu_per_process(args)
        super().__init__(model=module, args=args)
        self._module = module
        self._out = Path(str(args.output_dir))
        self.remove_callback(PrinterCallback)
        self.objective: Objective = objective
        self.knob = knob
        self._sums: dict[str, float] = {}
        self._since = time.perf_counter()
        self._ids: list[str] = []

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
        """
        step: Step = inputs
        model.train()  # every module below it: the model came from loading in eval mode
        self._ids = [group.id for group in step["groups"]]
        self._seed()
        scale = 0.0 if step["idle"] else self.args.world_size / step["weight"]
        batches = cut(step["groups"], self.knob)
        losses = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            run = self._backward_whole if batch.parts is None else self._backward_parts
            losses.append(run(model, batch, scale, last))
        if not step["idle"]:
            self._add("prompts", len(step["groups"]))
        loss = torch.stack(losses)
        if not loss.isfinite().all():
            culprits = [
                b for b, fine in zip(batches, loss.isfinite().tolist(), strict=True) if not fine
            ]
            self._stop("the loss", [group.id for batch in culprits for group in batch.groups])
        return loss.sum() * scale

    def _backward_whole(
        self, model: nn.Module, batch: Microbatch, scale: float, last: bool
    ) -> Tensor:
        with self._sync(model, last):
            logps = model(self._to_device(batch.tree()))
            loss, metrics = self.objective(logps, batch.groups)
            self.accelerator.backward(loss * scale)
        self._add_metrics(metrics, scale)
        return loss.detach()

    def _backward_parts(
        self, model: nn.Module, batch: Microbatch, scale: float, last: bool
    ) -> Tensor:
        """An oversized group, exactly: its loss couples all sequences, so all are scored first.

        That fixes the weight dloss/dlogp of each; then the parts are back-propagated with them.
        """
        trees = [self._to_device(tree) for tree in batch.part_trees()]
        scores = []
        for number, tree in enumerate(trees):
            self._seed(batch.groups[0].id, number)  # the second pass meets the same dropout
            with torch.no_grad():
                scores.append(self.accelerator.unwrap_model(model)(tree))
        leaf = torch.cat(scores).requires_grad_()
        loss, metrics = self.objective(leaf, batch.groups)
        (weights,) = torch.autograd.grad(loss * scale, leaf)
        for number, (tree, (start, stop)) in enumerate(zip(trees, batch.parts or (), strict=True)):
            self._seed(batch.groups[0].id, number)
            with self._sync(model, last and number == len(trees) - 1):
                logps = model(tree)
                self.accelerator.backward((logps * weights[start:stop]).sum())
        self._add_metrics(metrics, scale)
        return loss.detach()

    def _seed(self, *names: str | int) -> None:
        """Random numbers (dropout) from the place in the run alone, so none need be saved."""
        place = (self.state.global_step, self.args.process_index, *names)
        torch.manual_seed(rng(self.args.seed, "dropout", *map(str, place)).getrandbits(63))

    def _sync(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients travel between processes once a step, with its last backward."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def _to_device(self, tree: PrefixTree) -> PrefixTree:
        self._add("tokens", tree.num_tokens)
        return tree.to(self.args.device)

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def _add_metrics(self, metrics: Sums, scale: float) -> None:
        if metrics and scale:
            values = torch.stack([value.double() for value in metrics.values()]).tolist()
            for name, value in zip(metrics, values, strict=True):
                self._add(name, value)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            self._stop("the gradient", self._ids)
        return norm

    def _stop(self, what: str, ids: list[str]) -> None:
        shown = ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")
        raise ScminiError(
            f"{what} is not finite at step {self.state.global_step + 1} (prompts: {shown}); "
            "nothing of this step was kept. Lower learning_rate, or look at these prompts"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this window's metrics (means over prompts) and append the row to metrics.jsonl."""
        if "loss" in logs:
            logs |= self._window()
        super().log(logs, start_time)
        if "loss" in logs and self.is_world_process_zero():
            row = {"step": self.state.global_step, **logs}
            with open(self._out / METRICS, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")

    def _window(self) -> dict[str, float]:
        names = sorted({"prompts", "tokens", *self.objective.metrics})
        sums = torch.tensor([self._sums.get(name, 0.0) for name in names], dtype=torch.float64)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
        totals = dict(zip(names, sums.tolist(), strict=True))
        prompts, tokens = totals.pop("prompts"), totals.pop("tokens")
        now = time.perf_counter()
        seconds, self._since, self._sums = now - self._since, now, {}
        return {
            **{name: value / prompts for name, value in totals.items()},
            "perf/tokens_per_second": tokens / seconds,
            "memory/peak_gib": checkpoints.peak_gib(),
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            final = self._out / f"checkpoint-{self.state.global_step}"
            torn = checkpoints.temporary(final)
            checkpoints.save_model(self._module.model, torn)
            checkpoints.save_optimizer(cast(Any, self.optimizer).state_dict(), torn)
            schedule = json.dumps(cast(Any, self.lr_scheduler).state_dict())
            (torn / "scheduler.json").write_text(schedule, encoding="utf-8")
            self.state.save_to_json(str(torn / "trainer_state.json"))
            checkpoints.publish(torn, final)
            checkpoints.keep_newest(self._out, KEPT_CHECKPOINTS)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.restore_model(self._module.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            cast(Any, self.optimizer).load_state_dict(checkpoints.load_optimizer(Path(checkpoint)))
            schedule = (Path(checkpoint) / "scheduler.json").read_text(encoding="utf-8")
            cast(Any, self.lr_scheduler).load_state_dict(json.loads(schedule))


class _Progress(TrainerCallback):
    """Epochs as a person counts them, a log line with every checkpoint, and the progress bar."""

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / self.steps_per_epoch
        # A window of metrics never spans a checkpoint: resumed runs log what uninterrupted ones do.
        control.should_log |= control.should_save
        if state.is_world_process_zero:
            last = state.log_history[-1] if state.log_history else {}
            figures = {"loss": last["loss"]} if "loss" in last else {}
            console.progress(state.global_step, state.max_steps, "steps", **figures)


@dataclass(frozen=True)
class Trained:
    """What a training run leaves to tell."""

    steps: int
    peak_gib: float


def train(
    model: nn.Module,
    groups: Sequence[Group],
    objective: Objective,
    config: TrainingConfig,
    *,
    out: Path,
    seed: int,
    save_as: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adam_beta2: float = 0.999,
) -> Trained:
    """Train a PEFT model's adapter (or all of a plain model), resuming from the newest checkpoint.

    Writes `out`/`save_as`/ (weights, tokenizer), metrics.jsonl, trainer_state.json and the newest
    checkpoint-N/. An interrupted run continues to the same losses and weights (on the CPU, to the
    same bytes). Works in several processes under torchrun or `accelerate launch`.

    Args:
        model: on its device; parameters that require gradients are trained.
        groups: the prompts; their order does not matter to the result, the seed draws another.

    Raises:
        DataError: no prompt.
        ScminiError: a loss or gradient that is not finite (naming the prompts).
    """
    if not groups:
        raise DataError("no prompt is left to train on: all are longer than model.max_length")
    out.mkdir(parents=True, exist_ok=True)
    args = _arguments(config, out, seed, adam_beta2)
    steps = Steps(groups, objective, config, seed, args.process_index, args.world_size)
    args.max_steps = len(steps)
    args.warmup_steps = math.ceil(config.warmup_ratio * len(steps))
    try:
        trainer = TreeTrainer(TreeModule(model), args, objective, config.tokens_per_microbatch)
    except (RuntimeError, ImportError) as error:
        if config.report_to != "none" and config.report_to in str(error).lower():
            raise EnvironmentProblem(f"report_to: {config.report_to}: {error}") from None
        raise
    trainer.train_dataset = steps
    trainer.add_callback(_Progress(steps.per_epoch))
    start = checkpoints.newest(out)
    if trainer.is_world_process_zero():
        done = 0 if start is None else checkpoints.step_of(start)
        checkpoints.truncate_metrics(out / METRICS, done)
        console.progress(done, len(steps), "steps")
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if trainer.is_world_process_zero():
        torn = checkpoints.temporary(out / save_as)
        checkpoints.save_model(model, torn, tokenizer)
        checkpoints.publish(torn, out / save_as)
        trainer.state.save_to_json(str(out / "trainer_state.json"))
        checkpoints.keep_newest(out, 1)
    trainer.accelerator.wait_for_everyone()
    return Trained(len(steps), round(checkpoints.peak_gib(), 3))


def _arguments(
    config: TrainingConfig, out: Path, seed: int, adam_beta2: float
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return TrainingArguments(
        output_dir=str(out),
        seed=seed,
        use_cpu=not on_gpu,
        ddp_backend="gloo" if several and not on_gpu else None,
        # Every parameter that is trained takes part in every forward, and the processes may make
        # different numbers of them, so buffers must not be exchanged.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=OPTIMIZERS.get(config.optim, config.optim),
        adam_beta2=adam_beta2,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=[config.report_to],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bf16=False,
    )


def one_gpu_per_process(args: TrainingArguments) -> None:
    """Where a single process sees several GPUs, transformers would wrap the model in DataParallel.

    That cuts batches along their first dimension, which a tree has not.
    """
    args._n_gpu = min(args.n_gpu, 1)
