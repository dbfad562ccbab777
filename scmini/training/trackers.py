"""Experiment trackers (`report_to`), through transformers' own integrations.

metrics.jsonl is the truth, and a tracker shows what stands there: the same rows, the same numbers,
each name behind transformers' `train/`. A session that resumes begins by telling its tracker the
rows up to its checkpoint, so its curve is whole and holds no step twice:

    tensorboard   <stage's folder>/log/tensorboard, written anew by each session
    wandb         one W&B run a session, all with one name, which is also their group
    trackio       one run a session: the name with the time behind it

A tracker that does not open stops the training before its first step; one that fails later is
warned about and left.
"""

import copy
import importlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from scmini import console
from scmini.config import Config
from scmini.errors import EnvironmentProblem
from scmini.quoting import plain, redact
from scmini.sections import TrainingConfig
from scmini.training.keeping import METRICS

PROJECT = "scmini"
EVENTS = "log/tensorboard"
_CALLBACKS = {
    "tensorboard": TensorBoardCallback,
    "trackio": TrackioCallback,
    "wandb": WandbCallback,
}


@dataclass(frozen=True)
class Label:
    """How a training appears in a tracker."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration; JSON values, nothing secret among them."""


def label(config: Config, section: TrainingConfig, method: str) -> Label:
    """`<configuration>-<method>`, with the sections that this training reads."""
    settings = {
        "method": method,
        "seed": config.seed,
        "model": config.model.model_dump(mode="json"),
        "training": section.model_dump(mode="json"),
    }
    return Label(f"{config.name}-{method}", json.loads(redact(json.dumps(settings))))


class Tracker(TrainerCallback):
    """Gives one integration of transformers the rows of metrics.jsonl, each once.

    Args:
        kind: `tensorboard`, `trackio` or `wandb`.
        args: of the Trainer; names of the run and its project are put into a copy.

    Raises:
        EnvironmentProblem: the package is not installed.
    """

    def __init__(self, kind: str, args: TrainingArguments, label: Label) -> None:
        self.kind = kind
        self._out = Path(str(args.output_dir))
        self._args = copy.copy(args)
        self._label = label
        self._lost = False
        _prepare(kind, self._args, label, self._out)
        try:
            self._inner: Any = _CALLBACKS[kind](*_writer(kind, self._out))
        except (RuntimeError, ImportError) as error:
            raise EnvironmentProblem(
                f"report_to: {kind}: {plain(error)} pip install '{kind}', or set report_to: none"
            ) from None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the tracker, and tell it the steps that are kept from before.

        Raises:
            EnvironmentProblem: it does not open (no login, no connection).
        """
        try:
            if self.kind == "wandb":  # it would go on with a run that an earlier training left
                importlib.import_module("wandb").finish(exit_code=1)
            self._inner.on_train_begin(self._args, state, control, **kwargs)
            self._tell_settings()
            for row in self._rows():
                before = copy.copy(state)
                before.global_step = row.pop("step")
                self._inner.on_log(self._args, before, control, logs=row)
        except Exception as error:
            raise EnvironmentProblem(
                f"report_to: {self.kind}: {plain(error)}\n{_REMEDIES[self.kind]}"
            ) from error

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One row of metrics.jsonl; transformers' summary at the end is none."""
        if "loss" in kwargs["logs"] and not self._lost:
            self._guarded(self._inner.on_log, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the tracker: the next training of this process opens it anew."""
        if self.kind == "wandb":  # its own on_train_end would upload models where it is told to
            self._guarded(lambda *_: importlib.import_module("wandb").finish(), state, control)
        else:
            self._guarded(self._inner.on_train_end, state, control, **kwargs)

    def _guarded(self, call: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            call(self._args, state, control, **kwargs)
        except Exception as error:
            self._lost = True
            console.warn(
                f"report_to: {self.kind} failed at step {state.global_step} and gets no more: "
                f"{plain(error)}. Training goes on; {METRICS} has every step"
            )

    def _rows(self) -> list[dict[str, Any]]:
        path = self._out / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]

    def _tell_settings(self) -> None:
        settings = dict(self._label.settings)
        if self.kind == "tensorboard":
            self._inner.tb_writer.add_text("scmini", f"```json\n{json.dumps(settings, indent=1)}")
        else:
            importlib.import_module(self.kind).config.update({"scmini": settings})


_REMEDIES = {
    "tensorboard": "set report_to: none to train without it",
    "trackio": "set report_to: none to train without it",
    "wandb": "log in (wandb login), set WANDB_MODE=offline, or set report_to: none",
}


def _writer(kind: str, out: Path) -> tuple[Any, ...]:
    """What the integration is made with: TensorBoard's own choice is a new folder each time."""
    if kind != "tensorboard":
        return ()
    from torch.utils.tensorboard import SummaryWriter

    return (SummaryWriter(str(out / EVENTS)),)


def _prepare(kind: str, args: TrainingArguments, label: Label, out: Path) -> None:
    """Names of the run; what an earlier session left open or half told goes."""
    args.run_name = label.name
    if kind == "tensorboard":
        shutil.rmtree(out / EVENTS, ignore_errors=True)
    elif kind == "trackio":
        args.project = PROJECT
        args.run_name += time.strftime("-%Y%m%d-%H%M%S")
        args.trackio_space_id = os.environ.get("TRACKIO_SPACE_ID")
        # Nothing is published: a Space is made only where one was named, and privately.
        args.trackio_static_space_id = False
        args.hub_private_repo = True
    elif kind == "wandb":
        os.environ.setdefault("WANDB_PROJECT", PROJECT)
        os.environ["WANDB_RUN_GROUP"] = label.name
        # The output of a stage has its own log, with texts of the data in it.
        os.environ.setdefault("WANDB_CONSOLE", "off")
