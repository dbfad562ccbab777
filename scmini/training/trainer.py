"""Training on prefix trees, from a list of prompts to an adapter in a folder.

One optimizer step is a fixed number of prompts (tree_trainer.py). What is written while it goes on
is in keeping.py.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from scmini import console
from scmini.errors import DataError
from scmini.sections import DPOConfig, SFTConfig, SFTContinuedConfig, TrainingConfig
from scmini.store import Work
from scmini.training import checkpoints, trackers
from scmini.training.batches import Group
from scmini.training.keeping import METRICS
from scmini.training.progress import Progress, stopping
from scmini.training.steps import Objective, Steps
from scmini.training.tree_trainer import TreeModule, TreeTrainer

OPTIMIZERS = {"adamw_torch": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}
"""Names of the configuration that transformers spells otherwise; fused is the same algorithm."""
SECTIONS = {
    TrainingConfig: "base",
    SFTConfig: "sft",
    SFTContinuedConfig: "sft_continued",
    DPOConfig: "dpo",
}
"""Where in the configuration a kind of settings is found, for messages."""


@dataclass(frozen=True)
class Trained:
    """What a training run leaves to tell."""

    steps: int
    peak_gib: float
    tokens_per_microbatch: int | None = None
    """What it had to be lowered to, where a GPU's memory ran out."""

    def note_in(self, work: Work) -> None:
        """Put it into the manifest."""
        work.note("steps", self.steps)
        work.note("peak_gib", self.peak_gib)
        if self.tokens_per_microbatch is not None:
            work.note("tokens_per_microbatch", self.tokens_per_microbatch)


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
    label: trackers.Label | None = None,
) -> Trained:
    """Train a PEFT model's adapter (or all of a plain model), resuming from the newest checkpoint.

    Writes `out`/`save_as`/ (weights, tokenizer), metrics.jsonl, trainer_state.json and the newest
    checkpoint-N/. An interrupted run continues to the same losses and weights (on the CPU, to the
    same bytes). Works in several processes under torchrun or `accelerate launch`.

    Args:
        model: on its device; parameters that require gradients are trained.
        groups: the prompts; their order does not matter to the result, the seed draws another.
        label: how it appears in the tracker of `report_to`; by default with the name of `out`.

    Raises:
        DataError: no prompt.
        DoesNotFit: a single sequence is too long for the GPU's memory (naming the prompt).
        ScminiError: a loss or gradient that is not finite (naming the prompts).
        Interrupted: SIGTERM; the step that was begun is finished and saved.
    """
    if not groups:
        raise DataError("no prompt is left to train on: all are longer than model.max_length")
    out.mkdir(parents=True, exist_ok=True)
    args = _arguments(config, out, seed, adam_beta2)
    steps = Steps(groups, objective, config, seed, args.process_index, args.world_size)
    args.max_steps = len(steps)
    args.warmup_steps = math.ceil(config.warmup_ratio * len(steps))
    key = f"{SECTIONS[type(config)]}.tokens_per_microbatch"
    trainer = TreeTrainer(
        TreeModule(model),
        args,
        objective,
        config.tokens_per_microbatch,
        key=key,
        tokenizer=tokenizer,
    )
    if config.report_to != "none" and trainer.is_world_process_zero():
        label = label or trackers.Label(out.name)
        trainer.add_callback(trackers.Tracker(config.report_to, args, label))
    trainer.train_dataset = steps
    start = checkpoints.newest(out)
    if trainer.is_world_process_zero():
        done = 0 if start is None else checkpoints.step_of(start)
        checkpoints.restore_metrics(out / METRICS, start)
        console.progress(done, len(steps), "steps")
    trainer.accelerator.wait_for_everyone()
    with stopping(alone=args.world_size == 1) as asked:
        trainer.add_callback(Progress(trainer, steps.per_epoch, asked))
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if trainer.is_world_process_zero():
        torn = checkpoints.temporary(out / save_as)
        checkpoints.save_model(model, torn, tokenizer)
        checkpoints.publish(torn, out / save_as)
        trainer.state.save_to_json(str(out / "trainer_state.json"))
        checkpoints.keep_newest(out, 1)
    trainer.accelerator.wait_for_everyone()
    return Trained(len(steps), round(checkpoints.peak_gib(), 3), trainer.schedule.lowered_to)


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
        report_to=["none"],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bf16=False,
    )
