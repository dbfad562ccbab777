"""What a training run writes: rows of metrics.jsonl, and checkpoints from which it goes on."""

import json
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from scmini.training import checkpoints

METRICS = "metrics.jsonl"
KEPT_CHECKPOINTS = 2


class KeepingTrainer(Trainer):
    """transformers' Trainer with metrics as sums over prompts, and checkpoints without pickle.

    Args:
        module: has the model to be kept as its attribute `model`.
        metrics: names of the sums that become means over prompts in a row.
    """

    def __init__(self, module: Any, args: TrainingArguments, metrics: tuple[str, ...]) -> None:
        super().__init__(model=module, args=args)
        self._module, self._metrics = module, metrics
        self._out = Path(str(args.output_dir))
        self.remove_callback(PrinterCallback)
        self._sums: dict[str, float] = {}
        self._since = self._saved = time.perf_counter()

    def seconds_since_checkpoint(self) -> float:
        """Time since this process last saved, or began."""
        return time.perf_counter() - self._saved

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

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
        totals = self._totals()
        prompts, tokens = totals.pop("prompts"), totals.pop("tokens")
        loss = totals.pop("loss") / totals.pop("steps")
        now = time.perf_counter()
        seconds, self._since, self._sums = now - self._since, now, {}
        return {
            "loss": loss,
            **{name: value / prompts for name, value in totals.items()},
            "perf/tokens_per_second": tokens / seconds,
            "memory/peak_gib": checkpoints.peak_gib(),
        }

    def _names(self) -> list[str]:
        return sorted({"prompts", "tokens", "loss", "steps", *self._metrics})

    def _totals(self) -> dict[str, float]:
        """The sums of the window so far, over all processes."""
        names = self._names()
        sums = torch.tensor([self._sums.get(name, 0.0) for name in names], dtype=torch.float64)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
        return dict(zip(names, sums.tolist(), strict=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        totals = self._totals()
        if self.args.should_save:
            final = self._out / f"checkpoint-{self.state.global_step}"
            torn = checkpoints.temporary(final)
            checkpoints.save_model(self._module.model, torn)
            checkpoints.save_optimizer(cast(Any, self.optimizer).state_dict(), torn)
            schedule = json.dumps(cast(Any, self.lr_scheduler).state_dict())
            (torn / "scheduler.json").write_text(schedule, encoding="utf-8")
            (torn / checkpoints.WINDOW).write_text(json.dumps(totals), encoding="utf-8")
            self.state.save_to_json(str(torn / "trainer_state.json"))
            checkpoints.publish(torn, final)
            checkpoints.keep_newest(self._out, KEPT_CHECKPOINTS)
        self._saved = time.perf_counter()
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.restore_model(self._module.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            cast(Any, self.optimizer).load_state_dict(checkpoints.load_optimizer(Path(checkpoint)))
            schedule = (Path(checkpoint) / "scheduler.json").read_text(encoding="utf-8")
            cast(Any, self.lr_scheduler).load_state_dict(json.loads(schedule))
            window = checkpoints.load_window(Path(checkpoint))
            # The others add nothing to what all had together. One that lacks a metric (of another
            # version) would make that metric's mean too small.
            if self.is_world_process_zero() and window.keys() >= set(self._names()):
                # Tokens are for the speed, and the time that these took is not known.
                self._sums = {**window, "tokens": 0.0}
