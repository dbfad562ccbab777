"""A process that trains a tiny model: killed at a step, or one of several. Run by test_training.py.

python train_process.py OUT OBJECTIVE KNOB [KILL_AFTER_STEP | term-STEP]
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from training_helpers import response_groups, text_groups, tiny_model, with_lora

from scmini.sections import TrainingConfig
from scmini.training import checkpoints
from scmini.training.losses import PreferenceObjective, SFTObjective
from scmini.training.trainer import train
from scmini.training.tree_trainer import TreeTrainer

CONFIG = {"prompts_per_step": 3, "num_train_epochs": 2, "save_steps": 2, "logging_steps": 3}
SEED = 3


def run(out: Path, objective: str, knob: int, prompts: int = 8) -> None:
    """Eight prompts, 3 a step, 2 epochs: 6 steps of 3, 3, 2 prompts."""
    torch.set_num_threads(1)
    config = TrainingConfig(**CONFIG, tokens_per_microbatch=knob, learning_rate=1e-2)
    if objective == "dpo":
        groups, loss = response_groups([1, 4, 2, 3, 1, 2, 4, 1][:prompts]), PreferenceObjective(0.1)
    else:
        groups, loss = text_groups(prompts), SFTObjective()
    model = (
        tiny_model("llama-tied") if objective == "base" else with_lora(tiny_model(), dropout=0.1)
    )
    if objective == "dpo":
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    train(model, groups, loss, config, out=out, seed=SEED, save_as="product")


def kill_after(step: int) -> None:
    """SIGKILL in the middle of writing the first checkpoint at or after a step."""
    original = checkpoints.publish

    def publish(torn: Path, final: Path) -> None:
        if checkpoints.step_of(final) > step:
            (torn / "optimizer.json").write_text("{")
            os.kill(os.getpid(), signal.SIGKILL)
        original(torn, final)

    checkpoints.publish = publish


def terminate_in(step: int) -> None:
    """SIGTERM between two micro-batches of a step (counted from 0)."""
    original = TreeTrainer._backward_whole

    def backward(self: TreeTrainer, *arguments: Any) -> torch.Tensor:
        loss = original(self, *arguments)
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    TreeTrainer._backward_whole = backward  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[4:] and sys.argv[4].startswith("term-"):
        terminate_in(int(sys.argv[4].removeprefix("term-")))
    elif sys.argv[4:]:
        kill_after(int(sys.argv[4]))
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
