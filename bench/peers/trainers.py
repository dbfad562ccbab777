"""One optimizer step of every implementation, inside its own Trainer: ours and TRL's.

All are transformers Trainers and are driven the same way: the Trainer's own loop runs, and a
callback, which waits for a word from outside before each step, reads the clocks. What is timed is
everything between the Trainer's on_step_begin and on_step_end: the policy's and the reference's
forward, backward, clipping, optimizer. Ours packs its trees inside that time; TRL's batches are
collated before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import Case
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from peers.implementations import Implementation, Setup
from peers.models import base_model, fill_adapter, lora_config, tokenizer
from scmini.models.loading import enable_checkpointing
from scmini.models.qlora import fuse_lora
from scmini.seeding import rng
from scmini.training.batches import Group, Microbatch, cut
from scmini.training.losses import PreferenceObjective
from scmini.training.scoring import score
from scmini.training.tree_trainer import TreeModule, TreeTrainer
from scmini_kernels import PrefixTree

BETA = 0.1
LEARNING_RATE = 5e-6
MANY_STEPS = 100_000

Prompts = list[tuple[list[int], list[list[int]]]]
"""Prompt ids, and the ids of the chosen response and k rejected ones."""


def random_prompts(case: Case, vocab: int, seed: int) -> Prompts:
    """Random ids; the responses to a prompt begin with different tokens, so share nothing."""
    draw = rng(seed, "benchmark", str(case), str(vocab))

    def ids(length: int) -> list[int]:
        return [draw.randrange(2, vocab) for _ in range(length)]

    found = []
    for _ in range(case.prompts):
        firsts = draw.sample(range(2, vocab), case.k + 1)
        responses = [[first, *ids(case.response - 1)] for first in firsts]
        found.append((ids(case.prompt), responses))
    return found


class Recording:
    """What a Trainer with a `training_step` leaves behind: the loss of the step so far."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.losses: list[Tensor] = []

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **options)  # type: ignore[misc]
        self.losses.append(loss.detach())
        return loss


class Separate(Microbatch):
    """A micro-batch whose sequences share nothing: each is a tree of its own."""

    def tree(self) -> PrefixTree:
        return PrefixTree.pack([[s] for group in self.groups for s in group.sequences])


class OurTrainer(Recording, TreeTrainer):
    """TreeTrainer, with the reference scored in the step if asked, and sharing switched off."""

    references: Callable[[list[Group]], list[Group]]
    sharing: bool

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        step = {**inputs, "groups": self.references(inputs["groups"])}
        return super().training_step(model, step, num_items_in_batch)

    def _backward_whole(self, model: torch.nn.Module, batch: Microbatch, scale: float) -> Tensor:
        seen = batch if self.sharing else Separate(batch.groups)
        return super()._backward_whole(model, seen, scale)

    def _lower(self, tokens: int) -> None:
        raise torch.OutOfMemoryError(f"a row did not fit; {tokens} would, but is another case")


class _SameStep(Dataset[Any]):
    """The same optimizer step again and again."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return MANY_STEPS

    def __getitem__(self, index: int) -> dict[str, Any]:
        # New objects, so that nothing counted in an earlier step is remembered.
        groups = [replace(group) for group in self.groups]
        return {"groups": groups, "weight": float(len(groups)), "idle": False}


def build(
    implementation: Implementation, setup: Setup, case: Case, out: Path
) -> tuple[Any, PeftModel]:
    """The implementation's Trainer, ready to `train()`, and the PEFT model inside."""
    prompts = random_prompts(case, setup.shape.vocab, setup.seed)
    make = _ours if implementation.trainer == "scmini" else _trl
    return make(implementation, setup, case, prompts, out)


def _ours(
    implementation: Implementation, setup: Setup, case: Case, prompts: Prompts, out: Path
) -> tuple[Any, PeftModel]:
    model = get_peft_model(base_model(setup), lora_config(setup.shape))
    fill_adapter(model, setup.seed)
    fuse_lora(model)  # as scmini.models.loading does
    if setup.checkpointing:
        enable_checkpointing(model)
    groups = [
        Group.of_responses(str(number), prompt, responses)
        for number, (prompt, responses) in enumerate(prompts)
    ]
    if implementation.layout == "pairs":
        groups = [
            Group(f"{group.id}.{j}", [group.sequences[0], rejected], [case.response] * 2)
            for group in groups
            for j, rejected in enumerate(group.sequences[1:], 1)
        ]
    knob = implementation.knob(case)
    module = TreeModule(model)
    sharing = implementation.layout in ("trees", "split")

    def scored(unscored: list[Group]) -> list[Group]:
        with model.disable_adapter():
            if sharing:
                values = score(module, unscored, knob)
            else:
                values = _score_separately(module, unscored, knob, setup.device)
        return [replace(g, ref_logps=ref) for g, ref in zip(unscored, values, strict=True)]

    if implementation.precomputed:
        groups = scored(groups)
    args = TrainingArguments(**_options(setup, out), bf16=False, dataloader_pin_memory=False)
    trainer = OurTrainer(module, args, PreferenceObjective(BETA), knob)
    trainer.references = (lambda unchanged: unchanged) if implementation.precomputed else scored
    trainer.sharing = sharing
    trainer.train_dataset = _SameStep(groups)
    return trainer, model


def _score_separately(
    module: TreeModule, groups: list[Group], knob: int, device: str
) -> list[list[float]]:
    """scmini.training.scoring.score, with sharing switched off."""
    module.eval()
    found = []
    for batch in cut(groups, knob):
        with torch.no_grad():
            flat = module(Separate(batch.groups).tree().to(device)).tolist()
        for group in batch.groups:
            found.append(flat[: len(group.sequences)])
            flat = flat[len(group.sequences) :]
    return found


def _trl(
    implementation: Implementation, setup: Setup, case: Case, prompts: Prompts, out: Path
) -> tuple[Any, PeftModel]:
    """TRL's DPOTrainer as shipped, on flattened pairs, with the base model as reference."""
    from datasets import Dataset as Table
    from trl import DPOConfig, DPOTrainer

    class OfIds(Recording, DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
            return dataset  # token ids already, which TRL itself does not take

    pairs = [
        {"prompt_ids": prompt, "chosen_ids": responses[0], "rejected_ids": rejected}
        for prompt, responses in prompts
        for rejected in responses[1:]
    ]
    at_once = case.k if implementation.at_once == "prompt" else 1
    args = DPOConfig(
        **{**_options(setup, out), "gradient_accumulation_steps": len(pairs) // at_once},
        beta=BETA,
        bf16=setup.device == "cuda",
        gradient_checkpointing=setup.checkpointing,
        max_length=None,
        per_device_train_batch_size=at_once,
        precompute_ref_log_probs=implementation.precomputed,
    )
    # The adapter's configuration, not an adapter: only so the base model is the reference.
    trainer = OfIds(
        model=base_model(setup),
        args=args,
        processing_class=tokenizer(),
        train_dataset=Table.from_list(pairs),
        peft_config=lora_config(setup.shape),
    )
    fill_adapter(trainer.model, setup.seed)
    return trainer, trainer.model


def _options(setup: Setup, out: Path) -> dict[str, Any]:
    """Arguments of both Trainers."""
    return {
        "output_dir": str(out),
        "use_cpu": setup.device == "cpu",
        "max_steps": MANY_STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        # Clipping is computed, as in real training, but never changes a gradient.
        "max_grad_norm": 1e9,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": setup.seed,
    }


class Halt(Exception):
    """Ends a Trainer's loop between two steps."""


class Conductor(TrainerCallback):
    """Calls `before` ahead of each step, and `after` with the step's loss; grabs gradients once.

    `before` returns whether to go on.
    """

    def __init__(
        self,
        trainer: Any,
        before: Callable[[], bool],
        after: Callable[[float], None],
        gradients: Callable[[], None],
    ) -> None:
        self.trainer, self.before, self.after = trainer, before, after
        self.gradients = gradients

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.losses.clear()
        if not self.before():
            raise Halt

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = torch.stack(self.trainer.losses).sum().item()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
        self.after(loss)
