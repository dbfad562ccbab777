"""The trainer: exactness of its steps, interruption, several processes, checks."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import train_process
from safetensors.torch import load_file
from torch import Tensor
from training_helpers import (
    gradients,
    response_groups,
    separate_logps,
    text_groups,
    tiny_model,
    with_lora,
)
from transformers import TrainingArguments

from scmini.errors import ScminiError
from scmini.models import loading
from scmini.sections import TrainingConfig
from scmini.training import checkpoints, trainer
from scmini.training.batches import Group, cut
from scmini.training.losses import PreferenceObjective, SFTObjective
from scmini.training.scoring import check_start, score
from scmini.training.steps import Steps
from scmini.training.tree_trainer import TreeModule, TreeTrainer

ROOT = Path(__file__).resolve().parents[2]
SIZES = [1, 5, 2, 3]
WHOLE, PIECES = 10_000, 25


def _trainer(model: torch.nn.Module, objective: Any, knob: int, out: Path) -> TreeTrainer:
    args = trainer._arguments(TrainingConfig(), out, 0, 0.999)
    return TreeTrainer(TreeModule(model), args, objective, knob)


def _step(
    groups: list[Group], objective: Any, knob: int, out: Path
) -> tuple[float, dict[str, Tensor]]:
    model = with_lora(tiny_model()).double()
    step = {"groups": groups, "weight": sum(map(objective.weight, groups)), "idle": False}
    tree_trainer = _trainer(model, objective, knob, out)
    loss = tree_trainer.training_step(tree_trainer.model, step)
    return loss.item(), gradients(model)


def test_a_model_that_comes_in_eval_mode_trains(tmp_path: Path) -> None:
    """As loading gives it; in eval mode layers would not drop out, and keep all activations."""
    model = with_lora(tiny_model(), dropout=0.5).eval()
    tree_trainer = _trainer(model, SFTObjective(), WHOLE, tmp_path)
    checkpointed: list[bool] = []
    loading.enable_checkpointing(model)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.register_forward_pre_hook(lambda m, _: checkpointed.append(m.training))
    groups = text_groups(2)
    step = {"groups": groups, "weight": sum(map(SFTObjective().weight, groups)), "idle": False}
    tree_trainer.training_step(tree_trainer.model, step)
    assert checkpointed
    assert all(checkpointed)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
@pytest.mark.parametrize("knob", [WHOLE, 60, PIECES, 1])
def test_step_equals_separate_sequences(loss_type: str, knob: int, tmp_path: Path) -> None:
    """However a step is cut, oversized prompts too: the loss and gradients of the slow twin."""
    groups = response_groups(SIZES)
    objective = PreferenceObjective(0.1, loss_type, rpo_alpha=0.3)
    model = with_lora(tiny_model()).double()
    expected = objective(separate_logps(model, groups), groups)[0] / len(groups)
    expected.backward()
    loss, grads = _step(groups, objective, knob, tmp_path)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-6, msg=key)


def test_parts_meet_the_same_dropout_twice(tmp_path: Path) -> None:
    """Else the weights of an oversized prompt would be those of another random network."""
    model = with_lora(tiny_model(), dropout=0.5)
    (group,) = groups = response_groups([5])
    module = TreeModule(model)
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _, __, logps: seen.append(logps.detach()))
    step = {"groups": groups, "weight": 1.0, "idle": False}
    _trainer(module.model, PreferenceObjective(0.1), PIECES, tmp_path).training_step(module, step)
    parts = len(seen) // 2
    assert parts > 1
    for first, second in zip(seen[:parts], seen[parts:], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    with torch.no_grad():
        module.eval()
        assert score(module, [group], PIECES)[0] != torch.cat(seen[:parts]).tolist()


def test_knob_really_cuts() -> None:
    assert any(batch.parts for batch in cut(response_groups(SIZES), PIECES))
    assert len(cut(response_groups(SIZES), 60)) > 1
    assert len(cut(response_groups(SIZES), WHOLE)) == 1


def test_sft_step_is_a_mean_over_tokens(tmp_path: Path) -> None:
    groups = text_groups(5)
    whole, grads = _step(groups, SFTObjective(), WHOLE, tmp_path)
    pieces, other = _step(groups, SFTObjective(), 15, tmp_path)
    model = TreeModule(with_lora(tiny_model()).double())
    total = sum(values[0] for values in score(model, groups, WHOLE))
    assert whole == pytest.approx(-total / sum(g.num_scored[0] for g in groups), rel=1e-6)
    assert pieces == pytest.approx(whole, rel=1e-9)
    for key, grad in grads.items():
        torch.testing.assert_close(other[key], grad, rtol=1e-5, atol=1e-7, msg=key)


def test_order_is_a_permutation_per_epoch() -> None:
    groups = text_groups(10)
    config = TrainingConfig(prompts_per_step=4, num_train_epochs=2)
    steps = Steps(groups, SFTObjective(), config, seed=1)
    assert len(steps) == 6
    ids = [sorted(g.id for g in steps[i]["groups"]) for i in range(6)]
    assert [len(found) for found in ids] == [4, 4, 2] * 2
    everything = sorted(g.id for g in groups)
    assert sorted(chain(*ids[:3])) == sorted(chain(*ids[3:])) == everything
    assert ids[:3] != ids[3:]
    again = Steps(groups, SFTObjective(), config, seed=1)
    assert sorted(g.id for g in again[4]["groups"]) == ids[4], "depends on what was asked before"


@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_make_the_step(world_size: int) -> None:
    groups = text_groups(10)
    config = TrainingConfig(prompts_per_step=3, num_train_epochs=1)
    alone = Steps(groups, SFTObjective(), config, seed=1)
    shares = [
        Steps(groups, SFTObjective(), config, 1, rank, world_size) for rank in range(world_size)
    ]
    for i in range(len(alone)):
        parts = [steps[i] for steps in shares]
        working = [g.id for part in parts if not part["idle"] for g in part["groups"]]
        assert sorted(working) == sorted(g.id for g in alone[i]["groups"])
        assert all(part["groups"] for part in parts), "a process without work would hang the others"
        assert {part["weight"] for part in parts} == {alone[i]["weight"]}
    assert any(part["idle"] for part in parts), "the last step has one prompt"


def _product(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "product").iterdir())}


def _losses(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))} for row in rows
    ]


def _process(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    script = [str(Path(train_process.__file__)), *map(str, arguments)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *script],
        env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["dpo", "sft", "base"])
def test_interrupted_run_ends_the_same(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the step after a checkpoint (sft: with dropout), and again before the product."""
    train_process.run(tmp_path / "whole", objective, PIECES)
    step = TreeTrainer.training_step

    def stop(self: TreeTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TreeTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_process.run(tmp_path / "torn", objective, PIECES)
    assert checkpoints.newest(tmp_path / "torn") == tmp_path / "torn" / "checkpoint-4"
    kept = sorted(path.name for path in (tmp_path / "torn").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')
    steps_made = []
    with monkeypatch.context() as patch:
        patch.setattr(
            TreeTrainer,
            "training_step",
            lambda self, *a, **k: (steps_made.append(self.state.global_step), step(self, *a, **k))[
                1
            ],
        )
        train_process.run(tmp_path / "torn", objective, PIECES)
    assert steps_made == [4, 5]
    assert _product(tmp_path / "torn") == _product(tmp_path / "whole")
    assert _losses(tmp_path / "torn") == _losses(tmp_path / "whole")
    assert [row["step"] for row in _losses(tmp_path / "whole")] == [3, 6]
    # Killed after the last checkpoint but before the product.
    product = _product(tmp_path / "torn")
    for path in (tmp_path / "torn" / "product").iterdir():
        path.unlink()
    train_process.run(tmp_path / "torn", objective, PIECES)
    assert _product(tmp_path / "torn") == product
    assert [p.name for p in (tmp_path / "torn").glob("checkpoint-*")] == ["checkpoint-6"]


def test_killed_while_writing_a_checkpoint(tmp_path: Path) -> None:
    """SIGKILL: the half-written checkpoint has no final name; the run continues from the last."""
    train_process.run(tmp_path / "whole", "dpo", WHOLE)
    killed = _process(tmp_path / "torn", "dpo", WHOLE, 2)
    assert killed.returncode == -9, killed.stderr
    assert [p.name for p in (tmp_path / "torn").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "torn" / "product").exists()
    train_process.run(tmp_path / "torn", "dpo", WHOLE)
    assert _product(tmp_path / "torn") == _product(tmp_path / "whole")
    assert _losses(tmp_path / "torn") == _losses(tmp_path / "whole")


def test_terminated_in_a_step(tmp_path: Path) -> None:
    """SIGTERM in step 3, with dropout: it is finished and kept, though no checkpoint was due."""
    train_process.run(tmp_path / "whole", "sft", PIECES)
    stopped = _process(tmp_path / "torn", "sft", PIECES, "term-2")
    assert "Interrupted: stopped by SIGTERM; kept up to step 3" in stopped.stderr
    assert checkpoints.newest(tmp_path / "torn") == tmp_path / "torn" / "checkpoint-3"
    assert [row["step"] for row in _losses(tmp_path / "torn")] == [3]
    train_process.run(tmp_path / "torn", "sft", PIECES)
    assert _product(tmp_path / "torn") == _product(tmp_path / "whole")
    assert _losses(tmp_path / "torn") == _losses(tmp_path / "whole")


def test_two_processes_train_the_same_whole_model(tmp_path: Path) -> None:
    """torchrun with gloo; every weight is trained. (Adapters: test_pressure.py.)"""
    train_process.run(tmp_path / "one", "base", PIECES)
    both = _process(tmp_path / "two", "base", PIECES, processes=2)
    assert both.returncode == 0, both.stderr[-3000:]
    one, two = (
        load_file(tmp_path / name / "product" / "model.safetensors") for name in ("one", "two")
    )
    assert set(one) == set(two)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)
    for a, b in zip(_losses(tmp_path / "one"), _losses(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_metrics_have_their_names(tmp_path: Path) -> None:
    train_process.run(tmp_path, "dpo", WHOLE)
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    named = {"step", "epoch", "loss", "grad_norm", "learning_rate"}
    named |= {"perf/tokens_per_second", "memory/peak_gib"}
    assert set(row) == named | set(PreferenceObjective.metrics)
    assert row["perf/tokens_per_second"] > 0
    assert 0 <= row["rewards/accuracies"] <= 1
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert state["epoch"] == 2


def test_no_pickle_is_written(tmp_path: Path) -> None:
    train_process.run(tmp_path, "sft", WHOLE)
    kinds = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors"}


def test_not_finite_names_the_prompts(tmp_path: Path) -> None:
    model = with_lora(tiny_model())
    groups = response_groups(SIZES)
    assert groups[2].ref_logps is not None
    groups[2].ref_logps[0] = float("nan")
    objective = PreferenceObjective(0.1)
    step = {"groups": groups, "weight": 4.0, "idle": False}
    with pytest.raises(ScminiError, match=r"loss is not finite at step 1 \(prompts: p2\)"):
        _trainer(model, objective, PIECES, tmp_path).training_step(TreeModule(model), step)


def test_gradient_that_is_not_finite_stops(tmp_path: Path) -> None:
    model = with_lora(tiny_model())
    tree_trainer = _trainer(model, SFTObjective(), WHOLE, tmp_path)
    step = {"groups": text_groups(1), "weight": 1.0, "idle": False}
    tree_trainer.training_step(tree_trainer.model, step)
    next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(ScminiError, match=r"gradient is not finite.*t0"):
        tree_trainer._clip_grad_norm(tree_trainer.model)


def test_no_prompts() -> None:
    with pytest.raises(ScminiError, match="no prompt"):
        trainer.train(
            tiny_model(), [], SFTObjective(), TrainingConfig(), out=Path(), seed=0, save_as="x"
        )


def test_start_must_be_the_reference() -> None:
    model = with_lora(tiny_model())
    module = TreeModule(model)
    groups = response_groups(SIZES)
    scores = score(module, groups, WHOLE)
    right = [Group(g.id, g.sequences, g.num_scored, s) for g, s in zip(groups, scores, strict=True)]
    assert check_start(module, right, PIECES) < 1e-3
    with model.disable_adapter():
        wrong_scores = score(module, groups, WHOLE)
    wrong = [
        Group(g.id, g.sequences, g.num_scored, s) for g, s in zip(groups, wrong_scores, strict=True)
    ]
    with pytest.raises(ScminiError, match="not the policy's start"):
        check_start(module, wrong, WHOLE)
    nan = [Group(right[0].id, right[0].sequences, right[0].num_scored, [float("nan")] * 2)]
    with pytest.raises(ScminiError, match="not the policy's start"):
        check_start(module, nan, WHOLE)


def test_score_equals_separate_sequences() -> None:
    model = with_lora(tiny_model())
    groups = response_groups(SIZES)
    expected = separate_logps(model, groups)
    for knob in (WHOLE, PIECES, 1):
        found = [value for values in score(TreeModule(model), groups, knob) for value in values]
        torch.testing.assert_close(torch.tensor(found), expected.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_checkpoints_of_bitsandbytes_optimizers(name: str, tmp_path: Path) -> None:
    """Their state_dict hides the moments in a dict; what was saved and loaded goes on the same."""
    bnb = pytest.importorskip("bitsandbytes")

    def make() -> tuple[torch.nn.Linear, Any]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(96, 64, bias=False)  # above 4096 weights: quantised moments
        return layer, getattr(bnb.optim, name)(layer.parameters(), lr=1e-2)

    def steps(layer: torch.nn.Linear, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            layer(torch.randn(8, 96, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    layer, optimizer = make()
    steps(layer, optimizer, range(3))
    checkpoints.save_optimizer(optimizer.state_dict(), tmp_path)
    again, restored = make()
    again.load_state_dict(layer.state_dict())
    restored.load_state_dict(checkpoints.load_optimizer(tmp_path))
    steps(layer, optimizer, range(3, 6))
    steps(again, restored, range(3, 6))
    assert torch.equal(layer.weight, again.weight)


def test_several_visible_gpus_are_no_data_parallel(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 4  # as on a machine with four, outside of torchrun
    TreeTrainer(TreeModule(with_lora(tiny_model())), args, SFTObjective(), 100)
    assert (args.n_gpu, args.train_batch_size) == (1, args.per_device_train_batch_size)
