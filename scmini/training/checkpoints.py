"""Checkpoints of a training run: complete or absent, without pickle.

    checkpoint-N/
      adapter_model.safetensors, adapter_config.json     or a whole model's files
      optimizer.safetensors, optimizer.json              moments; settings and counters
      scheduler.json  trainer_state.json
      window.json                                        metrics since the last row of metrics.jsonl

A checkpoint is written under a temporary name, synced and renamed, so a folder with a final name is
complete whenever the process was killed. Random numbers need no file: each step seeds its own.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scmini.models.loading import quietly, restore_adapter, save_adapter
from scmini.store import sealing, write_atomic

_NAME = re.compile(r"checkpoint-(\d+)")
MODEL_WEIGHTS = "model.safetensors"
WINDOW = "window.json"


def step_of(folder: Path) -> int:
    """The optimizer step after which a checkpoint was written; -1 for any other folder."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def newest(out: Path) -> Path | None:
    """The newest complete checkpoint in a folder."""
    return max((p for p in out.glob("checkpoint-*") if step_of(p) >= 0), key=step_of, default=None)


def keep_newest(out: Path, number: int) -> None:
    """Delete all but the newest checkpoints, the oldest first."""
    found = sorted((p for p in out.glob("checkpoint-*") if step_of(p) >= 0), key=step_of)
    for folder in found[: max(0, len(found) - number)]:
        # Renamed first: a folder half deleted must not look complete.
        doomed = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def save_model(
    model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """An adapter, or a whole model where there is no adapter, with the tokenizer if given."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder, tokenizer)
        return
    assert isinstance(model, PreTrainedModel), type(model)
    with quietly():
        model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def restore_model(model: nn.Module, folder: Path) -> None:
    """The weights that `save_model` wrote, into a model of the same shape."""
    if isinstance(model, PeftModel):
        restore_adapter(model, folder)
        return
    missing, unexpected = model.load_state_dict(load_file(folder / MODEL_WEIGHTS), strict=False)
    assert isinstance(model, PreTrainedModel), type(model)
    untied = set(missing) - set(model.all_tied_weights_keys)
    assert not untied, untied
    assert not unexpected, unexpected


def save_optimizer(state: dict[str, Any], folder: Path) -> None:
    """An optimizer's state_dict: tensors as safetensors, the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for key, value in _flat(slots).items():
            if isinstance(value, Tensor):
                # A copy: 8-bit optimizers share tables between parameters, safetensors may not.
                tensors[f"{index}.{key}"] = value.detach().cpu().clone().contiguous()
            else:
                scalars.setdefault(str(index), {})[key] = value
    save_file(tensors, folder / "optimizer.safetensors")
    rest = {"scalars": scalars, "param_groups": state["param_groups"]}
    (folder / "optimizer.json").write_text(json.dumps(rest), encoding="utf-8")


def _flat(slots: dict[str, Any]) -> dict[str, Any]:
    """A parameter's slots; those that bitsandbytes keeps in a dict among them come out of it."""
    flat: dict[str, Any] = {}
    for key, value in slots.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def load_optimizer(folder: Path) -> dict[str, Any]:
    """What `save_optimizer` wrote, as a state_dict."""
    rest = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {int(i): dict(slots) for i, slots in rest["scalars"].items()}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def load_window(folder: Path) -> dict[str, float]:
    """Sums of metrics that no row has yet; none in checkpoints of earlier versions.

    A damaged file counts as none: it costs a row some of its prompts, and no training.
    """
    try:
        found = json.loads((folder / WINDOW).read_bytes())
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def publish(torn: Path, final: Path) -> None:
    """Sync a finished folder and give it its name, all at once."""
    for path in sorted(torn.rglob("*")):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
    with sealing(final):
        shutil.rmtree(final, ignore_errors=True)
        os.rename(torn, final)
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def temporary(final: Path) -> Path:
    """An empty folder to write `final` in before `publish`."""
    torn = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(torn, ignore_errors=True)
    torn.mkdir(parents=True)
    return torn


def restore_metrics(path: Path, checkpoint: Path | None) -> None:
    """metrics.jsonl as it was at a checkpoint, whatever became of it since."""
    rows = []
    if checkpoint is not None:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        rows = [row for row in state["log_history"] if "loss" in row]
    lines = [json.dumps({"step": row.pop("step"), **row}) + "\n" for row in rows]
    write_atomic(path, "".join(lines).encode())


def peak_gib() -> float:
    """Most memory used so far: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
