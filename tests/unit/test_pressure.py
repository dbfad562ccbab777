"""GPU memory that runs out: smaller rows, the same results, and an end that says why."""

import gc
import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import tight_memory
import torch
import train_process
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tight_memory import room_for
from torch import Tensor
from training_helpers import gradients, response_groups, text_groups, tiny_model, with_lora

from scmini import console, worker
from scmini.errors import DoesNotFit
from scmini.models.memory import Knob, half_of, is_out_of_memory
from scmini.sections import TrainingConfig
from scmini.training import checkpoints, trainer
from scmini.training.batches import Group
from scmini.training.losses import PreferenceObjective, SFTObjective
from scmini.training.pressure import Schedule
from scmini.training.scoring import score
from scmini.training.tree_trainer import TreeModule, TreeTrainer

ROOT = Path(__file__).resolve().parents[2]
WHOLE = 10_000
SIZES = [1, 5, 2, 3]
OBJECTIVES: dict[str, Any] = {"dpo": PreferenceObjective(0.1), "sft": SFTObjective()}
GROUPS = {"dpo": lambda: response_groups(SIZES), "sft": lambda: text_groups(5)}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    return said


def step(kind: str, knob: int, out: Path, dropout: float = 0.0) -> tuple[Any, float, Any]:
    """A step: the trainer, its loss and its gradients."""
    model = with_lora(tiny_model(), dropout=dropout)
    groups, objective = GROUPS[kind](), OBJECTIVES[kind]
    args = trainer._arguments(TrainingConfig(), out, 0, 0.999)
    made = TreeTrainer(TreeModule(model), args, objective, knob, key="dpo.tokens_per_microbatch")
    share = {"groups": groups, "weight": sum(map(objective.weight, groups)), "idle": False}
    loss = made.training_step(made.model, share).item()
    return made, loss, gradients(model)


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "most"), [("dpo", 60), ("dpo", 25), ("sft", 25), ("sft", 14)])
def test_the_step_is_that_of_the_smaller_knob(
    kind: str, most: int, dropout: float, when: str, tmp_path: Path, warnings: list[str]
) -> None:
    """To the bit, metrics too: nothing of the failed attempts is left. (25 and 14: in parts.)"""
    with room_for(most, when=when) as rows:
        tight, loss, grads = step(kind, WHOLE, tmp_path / "tight", dropout)
    knob = tight.schedule.lowered_to
    assert knob is not None
    assert max(rows) > most
    assert 2 * len(warnings) < len(rows), "the knob falls in halves, not in small steps"
    assert warnings[-1].startswith("out of GPU memory in step 1: dpo.tokens_per_microbatch")
    assert f"-> {knob}, and on it goes" in warnings[-1]
    roomy, expected, twins = step(kind, knob, tmp_path / "roomy", dropout)
    assert loss == expected
    assert tight._sums == roomy._sums
    assert grads.keys() == twins.keys()
    assert all(torch.equal(grad, twins[key]) for key, grad in grads.items())
    if not dropout:  # rows as they were first: the same beyond rounding
        _, undisturbed, others = step(kind, WHOLE, tmp_path / "undisturbed")
        assert loss == pytest.approx(undisturbed, rel=1e-5)
        for key, grad in grads.items():
            torch.testing.assert_close(grad, others[key], rtol=1e-3, atol=1e-5, msg=key)


def test_nothing_of_a_failed_attempt_is_held(tmp_path: Path) -> None:
    """Else the retry would meet a GPU that is as full as before."""
    held: list[Any] = []
    alive: list[int] = []
    forward = TreeModule.forward

    def watched(self: TreeModule, tree: Any) -> Tensor:
        alive.append(sum(reference() is not None for reference in held))
        logps = forward(self, tree)
        held.append(weakref.ref(logps))
        if len(held) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logps

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TreeModule, "forward", watched)
            step("dpo", 60, tmp_path)
    finally:
        gc.enable()
    assert len(alive) > 2
    assert alive[2] == 0


def test_other_errors_are_no_lack_of_gpu_memory(tmp_path: Path) -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("anything"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert worker._is_out_of_memory(RuntimeError("CUDA error: out of memory")), "outside a step too"
    for error in (
        MemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ):
        assert not is_out_of_memory(error)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TreeModule, "forward", lambda *_, e=error: (_ for _ in ()).throw(e))
            with pytest.raises(type(error)) as caught:
                step("dpo", WHOLE, tmp_path)
        assert caught.value is error


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_sequence_that_does_not_fit_ends_the_training(
    when: str, tmp_path: Path, warnings: list[str]
) -> None:
    longest = max(
        Group("", [s], [1]).num_tokens for g in response_groups(SIZES) for s in g.sequences
    )
    with room_for(longest - 1, when=when), pytest.raises(DoesNotFit) as caught:
        step("dpo", WHOLE, tmp_path)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert message.startswith("out of GPU memory in step 1, prompt 'p")
    assert f": {longest} tokens of one sequence alone" in message
    assert "gradient_checkpointing" in message
    with room_for(longest, when=when):
        step("dpo", WHOLE, tmp_path)


def test_half_of_is_less_than_the_row() -> None:
    for knob in range(1, 40):
        for row in range(2, 60):
            assert 1 <= half_of(knob, row) < max(2, min(knob, row))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 500)), max_size=8))
def test_schedule_is_the_smallest_so_far(changes: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log" / "microbatch.json"
        schedule = Schedule(path, 400)
        for step, tokens in changes:
            schedule.lower(step, tokens)
        for known in (schedule, Schedule(path, 400)):
            for step in range(22):
                twin = 400
                for first, tokens in changes:
                    if first <= step and tokens < twin:
                        twin = tokens
                assert known.at(step) == twin


def test_schedule_remembers_and_forgets(tmp_path: Path) -> None:
    path = tmp_path / "log" / "microbatch.json"
    schedule = Schedule(path, 100)
    assert (schedule.at(7), schedule.lowered_to) == (100, None)
    assert not path.exists()
    schedule.lower(5, 50)
    schedule.lower(9, 12)
    again = Schedule(path, 100)
    for known in (schedule, again):
        assert [known.at(n) for n in (0, 4, 5, 8, 9, 99)] == [100, 100, 50, 50, 12, 12]
        assert known.lowered_to == 12
    again.lower(2, 60)  # met again before, by a machine with less memory
    assert [again.at(n) for n in (1, 2, 5)] == [100, 60, 50]
    assert Schedule(path, 80).at(99) == 80, "whoever sets a value gets it"
    for broken in (
        b"",
        b"{",
        b"5",
        b"[]",
        b'{"tokens_per_microbatch": 100, "lowered": [5]}',
        b"\xff",
    ):
        path.write_bytes(broken)
        assert Schedule(path, 100).at(99) == 100


def _losses(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))} for row in rows
    ]


def _product(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "product").iterdir())}


@pytest.mark.parametrize(("kind", "most"), [("dpo", 25), ("sft", 14)])
def test_an_interruption_after_a_halving(
    kind: str, most: int, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 has no room first; the run stops in step 4 and goes on from step 2. sft: dropout."""
    tight = {"calls_before": 2}
    with room_for(most, **tight):
        train_process.run(tmp_path / "whole", kind, WHOLE)
    said = [text for text in warnings if text.startswith("out of GPU memory")]
    assert said
    original = TreeTrainer.training_step

    def stop(self: TreeTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TreeTrainer, "training_step", stop)
        with room_for(most, **tight), pytest.raises(KeyboardInterrupt):
            train_process.run(tmp_path / "torn", kind, WHOLE)
    assert checkpoints.newest(tmp_path / "torn") == tmp_path / "torn" / "checkpoint-2"
    kept = json.loads((tmp_path / "torn" / "log" / "microbatch.json").read_text())
    assert kept["tokens_per_microbatch"] == WHOLE
    assert [first for first, _ in kept["lowered"]] == [2] * len(kept["lowered"])
    warnings.clear()
    with room_for(most):
        train_process.run(tmp_path / "torn", kind, WHOLE)
    assert not any("out of GPU memory" in text for text in warnings), "it met that again"
    assert _losses(tmp_path / "torn") == _losses(tmp_path / "whole")
    assert _product(tmp_path / "torn") == _product(tmp_path / "whole")


def test_two_processes_and_trouble_in_one(tmp_path: Path) -> None:
    """They train what one does; both try again in smaller rows, or both end and say why."""
    script = [str(Path(tight_memory.__file__)), str(tmp_path)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    both = subprocess.run(
        [sys.executable, *launcher, *script],
        env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert both.returncode == 0, both.stderr[-3000:]
    kept = json.loads((tmp_path / "little" / "log" / "microbatch.json").read_text())
    said = [line for line in both.stderr.splitlines() if "out of GPU memory in step 2" in line]
    assert len(said) == len(kept["lowered"]) > 0, "both tried again, one says so"
    train_process.run(tmp_path / "one", "dpo", WHOLE)
    one = load_file(tmp_path / "one" / "product" / "adapter_model.safetensors")
    for name in ("two", "little"):
        two = load_file(tmp_path / name / "product" / "adapter_model.safetensors")
        assert set(one) == set(two)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)
        for a, b in zip(_losses(tmp_path / "one"), _losses(tmp_path / name), strict=True):
            assert a.keys() == b.keys()
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    first, second = ((tmp_path / "too-little" / f"message-{n}").read_text() for n in (0, 1))
    assert second.startswith("DoesNotFit: out of GPU memory in step 1, prompt 'p")
    assert first.startswith("DoesNotFit: another process ran out of GPU memory in step 1")
    first, second = ((tmp_path / "not-finite" / f"message-{n}").read_text() for n in (0, 1))
    assert "the loss is not finite at step 1 (prompts: p" in second
    assert "non_finite-1.json" in second
    assert (tmp_path / "not-finite" / "log" / "non_finite-1.json").is_file()
    assert first == "ScminiError: the loss is not finite at step 1 in another process"


@pytest.mark.parametrize("most", [60, 25, 18])
def test_scoring_in_smaller_rows(most: int, warnings: list[str]) -> None:
    groups = response_groups(SIZES)
    module = TreeModule(with_lora(tiny_model()))
    expected = score(module, groups, WHOLE)
    knob = Knob(WHOLE, "reference.tokens_per_microbatch")
    with room_for(most):
        found = score(module, groups, knob)
        assert [len(row) for row in found] == [len(row) for row in expected]
        for row, twin in zip(found, expected, strict=True):
            assert row == pytest.approx(twin, abs=1e-4)
        before = len(warnings)
        assert score(module, groups, knob) == found
    assert before >= 1
    assert len(warnings) == before, "the second call knows already"
    assert "reference.tokens_per_microbatch" in warnings[0]
    assert knob.lowered_to == knob.tokens < 2 * most
    with room_for(5), pytest.raises(DoesNotFit, match=r"while scoring prompt 'p\d'.*one sequence"):
        score(module, groups, Knob(WHOLE))
