"""`report_to`: the trackers show what metrics.jsonl says, each step once, and never end a run."""

import json
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import text_groups, tiny_model, with_lora

from scmini import outside
from scmini.config import Config
from scmini.errors import EnvironmentProblem
from scmini.sections import TrainingConfig
from scmini.stage_graph import check_sources
from scmini.store import Recipe, Store, digest_of
from scmini.training import trackers
from scmini.training.losses import SFTObjective
from scmini.training.trackers import Label
from scmini.training.trainer import TreeTrainer, train

TRACKERS = ("tensorboard", "trackio", "wandb")
LABEL = Label("tiny-sft", {"seed": 3, "method": "sft"})
LAST = 4
Rows = list[dict[str, Any]]


def _train(out: Path, kind: str, label: Label | None = LABEL) -> None:
    """Four steps, a checkpoint after the second."""
    torch.set_num_threads(1)
    config = TrainingConfig(
        prompts_per_step=2, num_train_epochs=2, save_steps=2, report_to=kind, learning_rate=1e-2
    )
    groups, model = text_groups(4), with_lora(tiny_model())
    train(model, groups, SFTObjective(), config, out=out, seed=3, save_as="product", label=label)


def _interrupted(out: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the last step: the third is told to the tracker, but is in no checkpoint."""
    step = TreeTrainer.training_step

    def stop(self: TreeTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == LAST - 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TreeTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            _train(out, kind)


def _metrics(out: Path) -> Rows:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _as_tracked(rows: Rows) -> Rows:
    return [{("step" if k == "step" else f"train/{k}"): v for k, v in row.items()} for row in rows]


def _tensorboard_rows(out: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / trackers.EVENTS))
    read.Reload()
    rows: dict[int, dict[str, Any]] = {}
    for name in read.Tags()["scalars"]:
        for event in read.Scalars(name):
            row = rows.setdefault(event.step, {"step": event.step})
            assert name not in row, f"{name} twice at step {event.step}"
            row[name] = event.value
    return list(rows.values())


def _trackio_rows(folder: Path) -> dict[str, Rows]:
    """By run."""
    found: dict[str, Rows] = {}
    with sqlite3.connect(folder / f"{trackers.PROJECT}.db") as database:
        for run, text in database.execute("select run_name, metrics from metrics order by id"):
            row = json.loads(text)
            found.setdefault(run, []).append({"step": row.pop("train/global_step"), **row})
    return found


def _wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: protobuf in a log of LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, block = path.read_bytes(), 7, b"", 32768
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def _wandb_rows(path: Path) -> Rows:
    rows = []
    for record in _wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            row = {name: value for name, value in row.items() if not name.startswith("_")}
            rows.append({"step": row.pop("train/global_step"), **row})
    return rows


def _same(found: Rows, expected: Rows) -> None:
    assert [row["step"] for row in found] == list(range(1, LAST + 1))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_tensorboard_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files hold float32; all else is equal."""
    pytest.importorskip("tensorboard")
    _train(tmp_path / "whole", "tensorboard")
    _same(_tensorboard_rows(tmp_path / "whole"), _as_tracked(_metrics(tmp_path / "whole")))
    _interrupted(tmp_path / "torn", "tensorboard", monkeypatch)
    assert len(_metrics(tmp_path / "torn")) == LAST - 1
    _train(tmp_path / "torn", "tensorboard")
    _same(_tensorboard_rows(tmp_path / "torn"), _as_tracked(_metrics(tmp_path / "torn")))
    whole, torn = (
        [row["train/loss"] for row in _tensorboard_rows(tmp_path / name)]
        for name in ("whole", "torn")
    )
    assert whole == torn
    # Killed after the last checkpoint but before the product: no step is left to be told anew.
    for path in (tmp_path / "torn" / "product").iterdir():
        path.unlink()
    _train(tmp_path / "torn", "tensorboard")
    _same(_tensorboard_rows(tmp_path / "torn"), _as_tracked(_metrics(tmp_path / "torn")))


def test_event_files_are_sealed_and_change_nothing_downstream(tmp_path: Path) -> None:
    """They hold times, so what depends on a training must not depend on them."""
    pytest.importorskip("tensorboard")
    store, digests = Store(tmp_path / "store"), []
    for kind in ("none", "tensorboard"):
        recipe = Recipe("sft", None, 1, {"report_to": kind})
        with store.building(recipe) as work:
            assert work is not None
            _train(work.path, kind)
        found = store.find(recipe)
        assert found is not None
        store.verify(found)
        events = [name for name in found.manifest["files"] if "tfevents" in name]
        assert len(events) == (kind == "tensorboard")
        digests.append(digest_of(found.manifest))
    assert digests[0] == digests[1]


def test_trackio_has_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    script = (
        "import sys; from pathlib import Path; import pytest, test_trackers as t\n"
        "t._interrupted(Path('torn'), 'trackio', pytest.MonkeyPatch())\n"
        "import time; time.sleep(1.1)\n"  # the name of a run has the second in it
        "t._train(Path('torn'), 'trackio')"
    )
    _python(script, tmp_path, TRACKIO_DIR=str(tmp_path / "local"))
    runs = _trackio_rows(tmp_path / "local")
    assert all(name.startswith("tiny-sft-") for name in runs)
    _same(list(runs.values())[-1], _as_tracked(_metrics(tmp_path / "torn")))


def test_wandb_offline_has_every_step_once(tmp_path: Path) -> None:
    """Nobody is asked for a login, and what is written names run, group and project."""
    pytest.importorskip("wandb")
    script = (
        "from pathlib import Path; import pytest, test_trackers as t\n"
        "t._interrupted(Path('torn'), 'wandb', pytest.MonkeyPatch())\n"
        "t._train(Path('torn'), 'wandb')"
    )
    _python(script, tmp_path, WANDB_MODE="offline", WANDB_PROJECT="mine", WANDB_API_KEY="")
    runs = [_wandb_rows(path) for path in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    expected = _as_tracked(_metrics(tmp_path / "torn"))
    _same(max(runs, key=len), expected)
    assert sorted(map(len, runs)) == [LAST - 1, LAST]
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        records = list(_wandb_records(path))
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert (run.project, run.display_name, run.run_group) == ("mine", "tiny-sft", "tiny-sft")
        told = {u.key: u.value_json for r in records for u in r.config.update}
        assert json.loads(told["scmini"]) == LABEL.settings


def _python(script: str, folder: Path, **variables: str) -> None:
    """In its own process and folder, as a stage is: without a terminal, with this sys.path."""
    path = ":".join([str(Path(__file__).parent), *sys.path])
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": path, **variables}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "OMP_NUM_THREADS": "1"}, cwd=folder, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


class _Broken:
    """An integration that opens, and fails with its second row."""

    def __init__(self, **fails: bool) -> None:
        self.rows, self.fails = 0, fails
        self.closed = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.fails.get("begin"):
            raise RuntimeError("no such host")

    def on_log(self, *_: Any, **__: Any) -> None:
        self.rows += 1
        if self.rows == 2:
            raise OSError("database is locked")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.closed = True


def _with_integration(monkeypatch: pytest.MonkeyPatch, inner: _Broken) -> None:
    monkeypatch.setitem(trackers._CALLBACKS, "trackio", lambda: inner)
    monkeypatch.setattr(trackers.Tracker, "_tell_settings", lambda self: None)


def test_a_tracker_that_fails_is_left_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = _Broken()
    _with_integration(monkeypatch, inner)
    _train(tmp_path, "trackio", None)
    assert inner.rows == 2
    assert inner.closed
    assert [row["step"] for row in _metrics(tmp_path)] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("database is locked") == 1
    assert "failed at step 2" in said


def test_a_tracker_that_does_not_open_stops_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_integration(monkeypatch, _Broken(begin=True))
    monkeypatch.setattr(TreeTrainer, "training_step", lambda *_, **__: pytest.fail("a step"))
    with pytest.raises(EnvironmentProblem, match=r"trackio: no such host\n.*report_to: none"):
        _train(tmp_path, "trackio")


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_missing_package_is_found_before_anything_runs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "has_module", lambda name: name != kind)
    for section, methods in (
        ("sft", ["sft"]),
        ("dpo", ["sft", "self-contrast-1"]),
        ("sft_continued", ["sft", "sft-continued"]),
    ):
        config = Config.model_validate({section: {"report_to": kind}, "methods": methods})
        with pytest.raises(
            EnvironmentProblem, match=rf"{section}\.report_to.*pip install '{kind}'"
        ):
            check_sources(config)
        check_sources(config, finished=["sft", "dpo"])
    check_sources(Config.model_validate({"dpo": {"report_to": kind}, "methods": ["sft"]}))


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_missing_package_is_found_by_the_stage_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "transformers.integrations.integration_utils"
    monkeypatch.setattr(f"{module}.is_{kind}_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match=f"pip install '{kind}'"):
        _train(tmp_path, kind)


def test_wandb_without_a_login_is_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "has_module", lambda name: True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = ("MODE", "API_KEY", "IDENTITY_TOKEN_FILE", "CONFIG_DIR", "DIR")
    for name in [f"WANDB_{name}" for name in names] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    config = Config.model_validate({"sft": {"report_to": "wandb"}})
    with pytest.raises(EnvironmentProblem, match=r"sft\.report_to: wandb.*wandb login"):
        check_sources(config)
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "k" * 40)):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_sources(config)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_sources(config)


def test_nothing_is_published_by_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes a public Space where it is told to; here only a private one, if named."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    seen: list[Any] = []
    inner = _Broken()
    monkeypatch.setattr(inner, "on_train_begin", lambda args, *_, **__: seen.append(args))
    _with_integration(monkeypatch, inner)
    _train(tmp_path, "trackio")
    assert seen[0].trackio_space_id is None
    assert seen[0].trackio_static_space_id is False
    assert seen[0].hub_private_repo is True
    assert seen[0].project == "scmini"
    assert "hf_secret" not in json.dumps(seen[0].to_dict(), default=str)


def test_the_label_names_run_and_sections() -> None:
    config = Config.model_validate({"name": "mine", "dpo": {"beta": 0.3}, "seed": 7})
    label = trackers.label(config, config.dpo, "self-contrast-4")
    assert label.name == "mine-self-contrast-4"
    assert label.settings["training"]["beta"] == 0.3
    assert (label.settings["seed"], label.settings["method"]) == (7, "self-contrast-4")
    json.dumps(label.settings, allow_nan=False)


def test_a_key_in_the_configuration_is_not_told() -> None:
    secret = "hf_" + "a1" * 14
    config = Config.model_validate({"model": {"model_name_or_path": f"org/{secret}"}})
    assert secret not in json.dumps(trackers.label(config, config.sft, "sft").settings)
