"""What stops a training or warns of it: numbers that are not finite, chosen answers that fall."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import train_process
from peft import PeftModel
from torch import Tensor
from training_helpers import response_groups, text_groups, tiny_model, tiny_tokenizer, with_lora

from scmini import console
from scmini.errors import ScminiError
from scmini.sections import DPOConfig, TrainingConfig
from scmini.training import checkpoints, progress, trainer
from scmini.training.batches import Group
from scmini.training.losses import PreferenceObjective, SFTObjective, Sums
from scmini.training.progress import DRIFT, FALLEN, FALLEN_FOR, Collapse
from scmini.training.scoring import score
from scmini.training.tree_trainer import TreeModule, TreeTrainer

WHOLE, PIECES = 10_000, 25


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    return said


def stopped(
    groups: list[Group], objective: Any, out: Path, knob: int, tokenizer: Any = None
) -> tuple[str, dict[str, Any]]:
    """The message and the record of a step that must not be taken."""
    model = with_lora(tiny_model(), dropout=0.2)
    args = trainer._arguments(TrainingConfig(), out, 0, 0.999)
    made = TreeTrainer(TreeModule(model), args, objective, knob, tokenizer=tokenizer)
    share = {"groups": groups, "weight": sum(map(objective.weight, groups)), "idle": False}

    def step() -> None:
        made.training_step(made.model, share)
        made._clip_grad_norm(made.model)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ScminiError) as caught:
        step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    path = out / "log" / "non_finite.json"
    assert str(path) in str(caught.value)
    return str(caught.value), json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("knob", [WHOLE, PIECES])
def test_a_loss_that_is_not_finite(knob: int, tmp_path: Path) -> None:
    """Of a row of four prompts, the one is named; what it is stands in the file."""
    groups = response_groups([1, 5, 2, 3])
    assert groups[1].ref_logps is not None
    groups[1].ref_logps[3] = float("-inf")
    said, kept = stopped(groups, PreferenceObjective(0.1), tmp_path, knob, tiny_tokenizer())
    assert "the loss is not finite at step 1 (prompts: p1)" in said
    assert "learning_rate" in said
    assert (kept["not_finite"], kept["step"], kept["number_of_prompts"]) == ("the loss", 1, 1)
    assert kept["learning_rate"] == TrainingConfig().learning_rate
    (prompt,) = kept["prompts"]
    assert prompt["id"] == "p1"
    assert prompt["loss"] in ("nan", "inf")
    assert prompt["prompt"]["token_ids"] == groups[1].sequences[0][0].tolist()
    assert isinstance(prompt["prompt"]["text"], str)
    assert [row["token_ids"] for row in prompt["sequences"]] == [
        sequence[1].tolist() for sequence in groups[1].sequences
    ]
    assert [row["reference_logp"] for row in prompt["sequences"]].index("-inf") == 3
    assert all(math.isfinite(row["logp"]) for row in prompt["sequences"])


@dataclass(frozen=True)
class Broken:
    """A loss that is finite, with a gradient that is not for some prompts."""

    ids: tuple[str, ...]
    inner: Any
    metrics: tuple[str, ...] = ()

    def weight(self, group: Group) -> int:
        return int(self.inner.weight(group))

    def __call__(self, logps: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Sums]:
        loss, _ = self.inner(logps, groups)
        sizes = [len(group.sequences) for group in groups]
        for group, own in zip(groups, logps.split(sizes), strict=True):
            if group.id in self.ids:
                loss = loss + (own - own.detach()).abs().sqrt().sum()  # 0, with slope 0 / 0
        return loss, {}


@pytest.mark.parametrize("knob", [WHOLE, PIECES])
@pytest.mark.parametrize("ids", [("p2",), ("p0", "p3")])
def test_a_gradient_that_is_not_finite(ids: tuple[str, ...], knob: int, tmp_path: Path) -> None:
    groups = response_groups([1, 5, 2, 3])
    said, kept = stopped(groups, Broken(ids, PreferenceObjective(0.1)), tmp_path, knob)
    assert f"the gradient is not finite at step 1 (prompts: {', '.join(ids)})" in said
    assert [prompt["id"] for prompt in kept["prompts"]] == list(ids)
    assert all("text" not in row for p in kept["prompts"] for row in p["sequences"])


def test_the_record_of_sft(tmp_path: Path) -> None:
    groups = text_groups(5)
    _, kept = stopped(groups, Broken(("t3",), SFTObjective()), tmp_path, WHOLE)
    (prompt,) = kept["prompts"]
    (row,) = prompt["sequences"]
    whole = groups[3].sequences[0].input_ids.tolist()  # type: ignore[union-attr]
    assert prompt["prompt"]["token_ids"] + row["token_ids"] == whole
    assert row["num_tokens"] == len(row["token_ids"]) == groups[3].num_scored[0]


def test_many_prompts_are_counted_and_some_kept(tmp_path: Path) -> None:
    groups = response_groups([1] * 30)
    every = tuple(group.id for group in groups)
    said, kept = stopped(groups, Broken(every, PreferenceObjective(0.1)), tmp_path, WHOLE)
    assert "p9 and 20 more)" in said
    assert (kept["number_of_prompts"], len(kept["prompts"])) == (30, 20)


def test_a_record_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the numbers is said all the same."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scmini.training.non_finite.write_atomic", full)
    groups = response_groups([1, 2])
    model = with_lora(tiny_model())
    args = trainer._arguments(TrainingConfig(), tmp_path, 0, 0.999)
    objective = Broken(("p1",), PreferenceObjective(0.1))
    made = TreeTrainer(TreeModule(model), args, objective, WHOLE)
    made.training_step(made.model, {"groups": groups, "weight": 2.0, "idle": False})
    with pytest.raises(ScminiError, match=r"prompts: p1.*could not be written.*No space left"):
        made._clip_grad_norm(made.model)


def test_odd_ids_are_written(tmp_path: Path) -> None:
    (group,) = response_groups([1])
    odd = Group("\ud800\x1b[31m\u2028'\"", group.sequences, group.num_scored, group.ref_logps)
    _, kept = stopped([odd], Broken((odd.id,), PreferenceObjective(0.1)), tmp_path, WHOLE)
    assert kept["prompts"][0]["id"] == odd.id


def row(drift: float | None) -> dict[str, Any]:
    return {"loss": 0.5} if drift is None else {"loss": 0.5, DRIFT: drift}


def said_at(drifts: Sequence[float | None], *, every: int = 1, ends: bool = False) -> list[int]:
    """Steps at which a run with these rows is warned about."""
    watch = Collapse()
    found = []
    for number, drift in enumerate(drifts, start=1):
        last = ends and number == len(drifts)
        if watch.notice(row(drift), number * every, last=last):
            found.append(number * every)
    return found


def test_collapse_must_last() -> None:
    low = -FALLEN - 0.01
    assert said_at([0, -0.1, -0.3, -FALLEN] * 10) == []
    assert said_at([None] * 50) == [], "SFT"
    assert said_at([low] * (FALLEN_FOR - 1) + [0.0]) == []
    assert said_at(([low] * (FALLEN_FOR - 1) + [0.0]) * 5) == []
    assert said_at([0, 0, *[low] * 50]) == [2 + FALLEN_FOR], "once"
    assert said_at([0, low], every=10) == [20], "one row of many steps"
    assert said_at([0, low], every=2) == []
    assert said_at([0, low], every=2, ends=True) == [4], "nothing follows that could mend it"
    assert said_at([0, -0.4], ends=True) == []
    assert said_at([float("nan")] * 50, ends=True) == []


def test_collapse_that_gets_much_worse_is_told_again() -> None:
    assert said_at([-0.6] * 20 + [-1.1] * 20) == [FALLEN_FOR]
    assert said_at([-0.6] * 20 + [-1.3] * 20 + [-2.7] * 20) == [
        FALLEN_FOR,
        20 + FALLEN_FOR,
        40 + FALLEN_FOR,
    ]
    assert len(said_at([-0.05 * n for n in range(400)])) < 8, "20 nats: no rain of warnings"


def _taught(out: Path) -> tuple[PeftModel, list[Group]]:
    """A model that knows its targets, and prompts with the log-probabilities that it gives them."""
    groups = response_groups([1, 4, 2, 3, 1, 2, 4, 1])
    texts = [
        Group.of_text(g.id, [*prompt, *target], [False] * len(prompt) + [True] * len(target))
        for g in groups
        for prompt, target in [g.sequences[0]]
    ]
    config = TrainingConfig(learning_rate=1e-2, num_train_epochs=20, prompts_per_step=4)
    model = tiny_model()
    trainer.train(model, texts, SFTObjective(), config, out=out, seed=0, save_as="model")
    policy = with_lora(model)
    scores = score(TreeModule(policy), groups, WHOLE)
    return policy, [
        Group(g.id, g.sequences, g.num_scored, s) for g, s in zip(groups, scores, strict=True)
    ]


def _train(out: Path, learning_rate: float) -> list[dict[str, Any]]:
    policy, groups = _taught(out / "base")
    config = DPOConfig(
        learning_rate=learning_rate, num_train_epochs=6, prompts_per_step=4, logging_steps=1
    )
    options: dict[str, Any] = {"out": out, "seed": 1, "save_as": "adapter"}
    trainer.train(policy, groups, PreferenceObjective(0.1), config, **options)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_quiet_training_and_a_destroyed_one(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[dict[str, float]] = []
    monkeypatch.setattr(progress.console, "progress", lambda *_, **found: figures.append(found))
    rows = _train(tmp_path / "quiet", 1e-3)
    assert warnings == []
    assert rows[-1]["rewards/margins"] > 0.05, "it learned nothing, and proves nothing"
    first, last = rows[0], rows[-1]
    assert first[DRIFT] == pytest.approx(0, abs=1e-4)
    assert figures[-1].keys() == {"loss", "margin", "drift"}
    assert figures[-1]["margin"] == rows[-2]["rewards/margins"]
    assert last["kl/rejected"] == pytest.approx(-last["rewards/rejected"] / 0.1, rel=1e-4)
    rows = _train(tmp_path / "destroyed", 1e-1)
    assert rows[-1][DRIFT] < -FALLEN
    assert 1 <= len(warnings) <= 4
    for name in ("dpo.rpo_alpha", "dpo.learning_rate", "dpo.beta", "dpo.num_prompts"):
        assert name in warnings[0]


def test_a_resumed_run_does_not_warn_again(tmp_path: Path, warnings: list[str]) -> None:
    """Rows before the checkpoint are taken in silently; a killed last step is done again."""
    watched = [row(-0.6) | {"step": n} for n in range(1, 9)]
    watch = Collapse()
    before = [watch.notice(r, r["step"]) for r in watched]
    assert sum(text is not None for text in before) == 1
    assert watch.notice(row(-0.6), 9, last=True) is None, "said before, and not much worse"


def test_time_asks_for_checkpoints_and_new_steps_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of metrics.jsonl depend on no checkpoint; a resumed run takes the keys as they are."""
    train_process.run(tmp_path / "whole", "dpo", WHOLE)
    saved: list[int] = []
    publish = checkpoints.publish

    def seen(torn: Path, final: Path) -> None:
        publish(torn, final)
        saved.append(checkpoints.step_of(final))

    monkeypatch.setattr(checkpoints, "publish", seen)
    with monkeypatch.context() as patch:
        patch.setattr("scmini.training.tree_trainer.SECONDS_BETWEEN_CHECKPOINTS", 0)
        train_process.run(tmp_path / "often", "dpo", WHOLE)
    assert saved == [1, 2, 3, 4, 5, 6, -1]
    assert _rows(tmp_path / "often") == _rows(tmp_path / "whole")
    saved.clear()
    step = TreeTrainer.training_step

    def stop(self: TreeTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TreeTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_process.run(tmp_path / "torn", "dpo", WHOLE)
    assert saved == [2, 4]
    monkeypatch.setitem(train_process.CONFIG, "save_steps", 5)
    monkeypatch.setitem(train_process.CONFIG, "logging_steps", 1)
    train_process.run(tmp_path / "torn", "dpo", WHOLE)
    assert saved == [2, 4, 5, 6, -1]
    assert [json.loads(text)["step"] for text in _rows(tmp_path / "torn")] == [3, 5, 6]
    product = [
        (tmp_path / name / "product/adapter_model.safetensors") for name in ("torn", "whole")
    ]
    assert product[0].read_bytes() == product[1].read_bytes()


@pytest.mark.parametrize("kept", [None, b"{", b"[]", b"older"])
def test_a_window_that_cannot_be_read(
    kept: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompts are missing in one row; the row is right for the others, and training goes on."""
    monkeypatch.setitem(train_process.CONFIG, "logging_steps", 1)
    train_process.run(tmp_path / "whole", "dpo", WHOLE)
    monkeypatch.setitem(train_process.CONFIG, "logging_steps", 5)
    monkeypatch.setitem(train_process.CONFIG, "save_steps", 4)
    torn = tmp_path / "torn"
    with monkeypatch.context() as patch:
        patch.setattr(TreeTrainer, "log", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train_process.run(torn, "dpo", WHOLE)
    path = torn / "checkpoint-4" / "window.json"
    older = {key: n for key, n in json.loads(path.read_bytes()).items() if key != "kl/rejected"}
    path.unlink()
    if kept is not None:
        path.write_bytes(json.dumps(older).encode() if kept == b"older" else kept)
    train_process.run(torn, "dpo", WHOLE)
    fifth, twin = (json.loads(_rows(tmp_path / n)[i]) for n, i in (("torn", 0), ("whole", 4)))
    twin["epoch"] = fifth["epoch"]
    assert fifth == pytest.approx(twin)
    products = [tmp_path / n / "product/adapter_model.safetensors" for n in ("torn", "whole")]
    assert products[0].read_bytes() == products[1].read_bytes()


def _rows(out: Path) -> list[str]:
    """Of metrics.jsonl, but for times and memory."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))} for row in rows
    ]
    return [json.dumps(row) for row in kept]
