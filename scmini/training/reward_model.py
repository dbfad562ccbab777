"""A small reward model, trained on preference pairs with transformers' own Trainer.

For a data set that comes with labelled pairs but no reward model: the judge of the demo on real
dialogues. The loss is that of Bradley and Terry (1952) as every open reward model uses it,
-log sigmoid(r(chosen) - r(rejected)), averaged over pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from scmini import console
from scmini.config import Config
from scmini.errors import DataError, RecordError
from scmini.models.loading import quietly
from scmini.models.reward import RewardModel, reward_ids
from scmini.records import Message, read_jsonl
from scmini.training import checkpoints
from scmini.training.tree_trainer import one_gpu_per_process

HELD_OUT_IN = 10
"""One prompt in so many is kept for the accuracy that is noted."""
SAVES = 10
"""Checkpoints over the whole training."""

Preference = tuple[list[Message], str, str]
"""Prompt, chosen, rejected."""


def train_reward_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    backbone_folder: Path,
    preferences: Path,
    out: Path,
) -> dict[str, Any]:
    """Train a reward model that starts from a base language model, and write it as a HF folder.

    Interrupted, it goes on from its newest checkpoint (in `scratch/` beside `out`) and ends with
    the same weights.

    Args:
        config: `base.reward_model`, `model.max_length` and `seed` are read.
        tokenizer: of the base model; with chat template and a padding token that nothing else uses.
        backbone_folder: the base language model.
        preferences: rows {"prompt": messages, "chosen": str, "rejected": str}.
        out: the folder to write: config, safetensors, tokenizer.

    Returns:
        Notes: training pairs, held-out pairs, accuracy on the latter (None without any), steps.

    Raises:
        DataError: no pair to train on, a broken row, or no usable padding token.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise DataError("a reward model needs a tokenizer whose padding token is not its end token")
    training, held_out = split(read_preferences(preferences))
    if not training:
        raise DataError(f"{preferences}: no preference pair to train a reward model on")
    set_seed(config.seed)  # the reward head is new
    scratch, torn = out.parent / "scratch" / out.name, checkpoints.temporary(out)
    with quietly():
        model = AutoModelForSequenceClassification.from_pretrained(
            str(backbone_folder),
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation="sdpa",
            pad_token_id=tokenizer.pad_token_id,
        )
        trainer = _trainer(config, model, tokenizer, training, scratch)
        trainer.train(resume_from_checkpoint=newest_checkpoint(scratch))
        model.save_pretrained(str(torn))
    tokenizer.save_pretrained(str(torn))
    checkpoints.publish(torn, out)
    return {
        "reward_model_pairs": len(training),
        "reward_model_held_out_pairs": len(held_out),
        "reward_model_accuracy": accuracy(config, model, tokenizer, held_out),
        "reward_model_steps": trainer.state.global_step,
    }


def read_preferences(path: Path) -> list[Preference]:
    """Rows of preferences.jsonl; `RecordError` names a row without prompt, chosen or rejected."""
    found = []
    for number, row in read_jsonl(path):
        if not isinstance(row.get("prompt"), list) or not row["prompt"]:
            raise RecordError(path, number, "field 'prompt': expected a list of messages")
        for key in ("chosen", "rejected"):
            if not isinstance(row.get(key), str):
                raise RecordError(path, number, f"field {key!r}: expected text")
        found.append((row["prompt"], row["chosen"], row["rejected"]))
    return found


def split(preferences: Sequence[Preference]) -> tuple[list[Preference], list[Preference]]:
    """Pairs to train on, and a tenth held out by the hash of their prompt: no prompt is in both."""
    training: list[Preference] = []
    held_out: list[Preference] = []
    for preference in preferences:
        text = json.dumps(preference[0], sort_keys=True, ensure_ascii=False)
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        (held_out if bucket % HELD_OUT_IN == 0 else training).append(preference)
    return training, held_out


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """mean of -log sigmoid(r_chosen - r_rejected); both (n,)."""
    return -logsigmoid(chosen - rejected).mean()


def accuracy(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    preferences: Sequence[Preference],
) -> float | None:
    """Share of pairs in which the chosen response has the higher reward; a tie counts half."""
    if not preferences:
        return None
    judge = RewardModel(
        model,
        tokenizer,
        max_length=config.model.max_length,
        tokens_per_microbatch=config.reward.tokens_per_microbatch,
    )
    scores = judge.score_all([(prompt, pair) for prompt, *pair in preferences])
    points = [(chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in scores]
    return sum(points) / len(points)


def newest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; torn ones are deleted.

    The Trainer writes trainer_state.json last, so one that can be read vouches for the rest.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = json.loads((path / "trainer_state.json").read_bytes())["global_step"]
            found.append((int(step), str(path)))
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


class _PairTrainer(Trainer):
    """The library's Trainer on batches of 2n rows: n chosen, then n rejected responses."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        rewards = model(**inputs).logits[:, 0]
        return pairwise_loss(*rewards.chunk(2))


class _Progress(TrainerCallback):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        history = state.log_history
        figures = {"loss": history[-1]["loss"]} if history and "loss" in history[-1] else {}
        console.progress(state.global_step, state.max_steps, "reward model steps", **figures)


def _trainer(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Preference],
    scratch: Path,
) -> Trainer:
    settings = config.base.reward_model
    steps = math.ceil(
        math.ceil(len(training) / settings.pairs_per_step) * settings.num_train_epochs
    )
    limits = {"pad_token_id": tokenizer.pad_token_id, "max_length": config.model.max_length}

    def collate(pairs: list[Preference]) -> dict[str, Tensor]:
        texts = [(p, good) for p, good, _ in pairs] + [(p, bad) for p, _, bad in pairs]
        rows = [reward_ids(tokenizer, prompt, text, **limits) for prompt, text in texts]
        batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        return dict(batch)

    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=settings.pairs_per_step,
        num_train_epochs=settings.num_train_epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.05 * steps),
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=config.seed,
        logging_steps=10,
        save_steps=max(1, steps // SAVES),
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    one_gpu_per_process(arguments)
    trainer = _PairTrainer(
        model=model,
        args=arguments,
        train_dataset=list(training),
        data_collator=collate,
        callbacks=[_Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
