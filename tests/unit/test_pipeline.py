"""The runner, with small stand-ins for the stages in real child processes."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from fake_stages import METHODS, behave, config, states

from scmini import pipeline, run_folder
from scmini.errors import EnvironmentProblem, StageFailed, StoreDamaged, UsageError
from scmini.locks import locked
from scmini.run_folder import RunFolder
from scmini.stage_graph import Task, tasks
from scmini.store import Store
from scmini.view.forecast import expected_seconds


def test_a_whole_run_and_what_a_change_runs_again(
    tmp_path: Path, executed: Any, capsys: Any
) -> None:
    run_dir = tmp_path / "runs" / "toy"
    pipeline.run(config(), run_dir)
    everything = [task.key for task in tasks(config())]
    assert executed() == everything
    assert set(states(pipeline.status(config(), run_dir)).values()) == {"done"}
    error = capsys.readouterr().err
    assert "dpo self-contrast-4: 1/1 steps (100 %), loss 0.5" in error
    stages = list(dict.fromkeys(task.phase for task in tasks(config())))
    told = [line for line in error.splitlines() if line.startswith("stage ") and " done" in line]
    assert [line.split(" done")[0] for line in told] == [
        f"stage {number} of {len(stages)}" for number in range(1, len(stages) + 1)
    ]

    began = time.monotonic()
    pipeline.run(config(), run_dir)
    assert time.monotonic() - began < 1
    assert executed() == []
    assert "Nothing to run" in capsys.readouterr().err

    dpo = [m for m in METHODS if m in ("dpo", "self-contrast-1", "self-contrast-4")]
    ends = [f"{stage}:{m}" for stage in ("dpo", "generate", "reward") for m in dpo] + ["report"]
    beta = config("dpo.beta=0.2")
    found = pipeline.status(beta, run_dir)
    assert [k for k, v in states(found).items() if v == "stale"] == ends
    reasons = {Task(row["name"], row["method"]).key: row["reason"] for row in found["stages"]}
    assert reasons["dpo:dpo"] == "dpo.beta: 0.1 -> 0.2"
    assert reasons["generate:dpo"] == "waits for dpo dpo"
    pipeline.run(beta, run_dir)
    assert executed() == ends
    pipeline.run(config(), tmp_path / "runs" / "other")  # shares the store
    assert executed() == []

    more = config(f"methods={json.dumps([*METHODS, 'self-contrast-2'])}")
    pipeline.run(more, run_dir)
    news = [f"{stage}:self-contrast-2" for stage in ("dpo", "generate", "reward")]
    assert executed() == ["filter", "reference", *news, "report"]

    pipeline.run(config("generate.temperature=0.5"), run_dir)
    assert executed() == [
        k for k in everything if k.split(":")[0] in ("generate", "reward", "report")
    ]
    pipeline.run(config("sft.tokens_per_microbatch=5", "dpo.save_steps=3"), run_dir)
    assert executed() == []
    pipeline.run(config("sft_continued.learning_rate=0.1"), run_dir)
    control = ["sft:sft-continued", "generate:sft-continued", "reward:sft-continued", "report"]
    assert executed() == control


def test_each_method_foretells_the_next_ones_of_its_process(
    tmp_path: Path, executed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    foretold: list[tuple[set[Task], set[Task]]] = []

    def listen(*args: Any) -> dict[Task, float]:
        found = expected_seconds(*args)
        foretold.append((set(args[2]), set(found)))
        return found

    monkeypatch.setattr(pipeline, "expected_seconds", listen)
    pipeline.run(config(), tmp_path / "runs" / "toy")
    first, second = (
        task for task in tasks(config()) if task.key in ("dpo:dpo", "dpo:self-contrast-1")
    )
    assert any(first in done and second in known for done, known in foretold)


def test_one_process_per_stage(tmp_path: Path, executed: Any) -> None:
    pipeline.run(config(), tmp_path / "toy")
    processes: dict[str, set[str]] = {}
    for line in Path(os.environ["FAKE_LOG"]).read_text().splitlines():
        key, pid = line.split()
        processes.setdefault(pid, set()).add(key)
    groups = list(processes.values())
    assert {"dpo:dpo", "dpo:self-contrast-1", "dpo:self-contrast-4"} in groups
    assert all(len({key.split(":")[0] for key in group}) == 1 for group in groups)
    stages = {task.stage for task in tasks(config())}
    assert len(groups) == len(stages) + 1  # sft-continued reads the adapter that sft makes


def test_links_of_the_run_folder(tmp_path: Path, executed: Any) -> None:
    run_dir = tmp_path / "toy"
    pipeline.run(config(), run_dir)
    for name in (
        *("config.yaml", "run.json", "data/train.jsonl", "data/test.jsonl", "sft/adapter/a"),
        *("samples/part-00000.parquet", "embeddings/part-00000.npy", "similarity/part-0.parquet"),
        *(
            "pairs/self-contrast-4.jsonl",
            "reference/logps.parquet",
            "models/self-contrast-4/adapter/a",
        ),
        *("models/sft-continued/metrics.jsonl", "generations/sft.jsonl", "rewards/dpo.jsonl"),
        "report/index.html",
    ):
        assert (run_dir / name).is_file(), name
    assert not os.path.isabs(os.readlink(run_dir / "data"))
    assert sorted(p.name for p in run_dir.iterdir() if p.name.startswith(".")) == []
    moved = tmp_path / "moved"
    moved.mkdir()
    os.rename(run_dir, moved / "toy")
    os.rename(tmp_path / ".store", moved / ".store")
    assert (moved / "toy" / "sft" / "adapter" / "a").is_file()
    pipeline.run(config("methods=[sft]"), moved / "toy")
    assert [p.name for p in (moved / "toy" / "generations").iterdir()] == ["sft.jsonl"]
    assert not (moved / "toy" / "pairs").exists()


def test_copies_where_links_are_not_possible(
    tmp_path: Path, executed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(run_folder.os, "symlink", refuse)
    run_dir = tmp_path / "toy"
    pipeline.run(config("methods=[sft]"), run_dir)
    before = (run_dir / "generations" / "sft.jsonl").read_text()
    assert (run_dir / "sft" / "adapter" / "a").is_file()
    assert not (run_dir / "sft").is_symlink()
    pipeline.run(config("methods=[sft]", "sft.lora_r=4"), run_dir)
    assert (run_dir / "generations" / "sft.jsonl").read_text() != before


def test_what_a_person_put_into_the_run_folder_stays(tmp_path: Path, executed: Any) -> None:
    mine = tmp_path / "toy" / "data"
    mine.mkdir(parents=True)
    (mine / "precious").touch()
    with pytest.raises(EnvironmentProblem, match="in the way"):
        pipeline.run(config(), tmp_path / "toy")
    assert (mine / "precious").exists()


def test_one_stage_and_ranges(tmp_path: Path, executed: Any) -> None:
    run_dir = tmp_path / "toy"
    with pytest.raises(UsageError, match=r"dpo needs data, .*scmini run all --until data -o"):
        pipeline.run(config(), run_dir, only="dpo")
    pipeline.run(config(), run_dir, until="filter")
    assert executed()[-1] == "filter"
    with pytest.raises(UsageError, match="dpo needs reference"):
        pipeline.run(config(), run_dir, from_="dpo")
    pipeline.run(config(), run_dir, only="reference")
    pipeline.run(config(), run_dir, only="dpo")
    assert executed() == ["reference", "dpo:dpo", "dpo:self-contrast-1", "dpo:self-contrast-4"]
    pipeline.run(config(), run_dir, from_="reference", until="generate")
    assert executed() == [f"generate:{m}" for m in METHODS]
    with pytest.raises(UsageError, match="did you mean reward"):
        pipeline.run(config(), run_dir, only="rewards")
    with pytest.raises(UsageError, match="no stage embed: no method"):
        pipeline.run(config("methods=[sft]"), run_dir, only="embed")
    with pytest.raises(UsageError, match="comes after"):
        pipeline.run(config(), run_dir, from_="dpo", until="sft")


def test_force(tmp_path: Path, executed: Any) -> None:
    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    pipeline.run(c, run_dir)
    executed()
    pipeline.run(c, run_dir, only="sft", force=True)
    assert executed() == ["sft"]
    pipeline.run(c, run_dir)
    assert executed() == []  # the same files came out


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        ({}, "run all -o {} --from sft --force"),
        (
            {"from_": "base", "until": "generate"},
            "run all -o {} --from sft --until generate --force",
        ),
        ({"only": "sft"}, "run sft -o {} --force"),
    ],
)
def test_how_to_go_on_with_force(
    tmp_path: Path,
    executed: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: dict[str, str],
    resume: str,
) -> None:
    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    pipeline.run(c, run_dir, until="sft")
    behave(monkeypatch, sft="crash")
    with pytest.raises(StageFailed) as caught:
        pipeline.run(c, run_dir, force=True, **words)  # type: ignore[arg-type]
    assert str(caught.value).endswith(f"to go on: scmini {resume.format(run_dir)}")


def test_what_is_said_to_be_finished(tmp_path: Path, executed: Any, capsys: Any) -> None:
    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    assert Task("report") in pipeline.run(c, run_dir)
    capsys.readouterr()
    assert list(pipeline.run(config("methods=[sft]", "sft.lora_r=4"), run_dir, until="data")) == [
        Task("data")
    ]
    assert "Nothing to run up to data: it is finished." in capsys.readouterr().err
    pipeline.run(c, run_dir)
    assert "Nothing to run: all of it is finished." in capsys.readouterr().err


def test_a_full_disk_does_not_hide_what_happened(
    tmp_path: Path, executed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    behave(monkeypatch, data="data")
    monkeypatch.setattr(RunFolder, "fail", _full)
    with pytest.raises(StageFailed, match="field 'id' is missing") as caught:
        pipeline.run(c, run_dir)
    assert caught.value.exit_code == 5
    monkeypatch.setattr(RunFolder, "begin", _full)
    with pytest.raises(EnvironmentProblem, match="toy: the disk is full"):
        pipeline.run(c, run_dir)


def test_what_can_be_typed_next(
    tmp_path: Path, executed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, run_dir = config("methods=[sft]"), tmp_path / "my toy"
    pipeline.run(c, run_dir, only="data")
    manifest = (run_dir / "data").resolve() / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(StoreDamaged, match=r"manifest\.json: damaged") as damaged:
        pipeline.run(c, run_dir, until="sft")
    go_on = f"scmini run all -o '{run_dir}' --until sft"
    assert str(damaged.value).splitlines()[-1] == (
        f"to go on: scmini repair -o '{run_dir}' && {go_on}"
    )
    monkeypatch.setattr(RunFolder, "begin", _full)
    with pytest.raises(EnvironmentProblem, match="the disk is full") as full:
        pipeline.run(c, run_dir, until="sft")
    assert str(full.value).splitlines()[-1] == f"to go on: {go_on}"


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_stages_of_another_version_stay_in_the_record(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    odd = {"distil": {}, "distil:dpo": {}, "data:dpo": {}, "dpo": {}}
    folder.record["stages"] = {**odd, "dpo:spin": {}}
    folder.begin(config(), [])
    assert RunFolder(tmp_path).record["stages"] == odd


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("crash", 1, ["sft: RuntimeError: out of ideas", "library noise of sft", "text.log"]),
        ("data", 5, ["sft: rows.jsonl, line 3: field 'id' is missing"]),
        ("memory", 4, ["out of memory; lower sft.tokens_per_microbatch (now 8192)"]),
        ("import", 3, ["'package_that_is_not_there' is missing: pip install"]),
        ("segfault", 1, ["crashed with SIGSEGV"]),
    ],
)
def test_failures(
    tmp_path: Path,
    executed: Any,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    code: int,
    said: list[str],
) -> None:
    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    behave(monkeypatch, sft=how)
    with pytest.raises(StageFailed) as caught:
        pipeline.run(c, run_dir)
    text = str(caught.value)
    assert caught.value.exit_code == code
    assert all(part in text for part in said), text
    assert text.endswith(f"to go on: scmini run all -o {run_dir}")
    assert "\x1b" not in text
    assert ("Traceback" in text) == (how == "crash")
    found = states(pipeline.status(c, run_dir))
    assert [found[k] for k in ("data", "base", "sft", "report")] == [
        "done",
        "done",
        "failed",
        "missing",
    ]
    behave(monkeypatch)
    pipeline.run(c, run_dir)
    assert set(states(pipeline.status(c, run_dir)).values()) == {"done"}
    assert executed()[:4] == ["data", "base", "sft", "sft"]


def test_a_damaged_input_is_named(tmp_path: Path, executed: Any) -> None:
    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    pipeline.run(c, run_dir, until="base")
    (run_dir / "data" / "train.jsonl").write_text("half")
    with pytest.raises(
        StageFailed, match=r"train\.jsonl: changed after it was written; scmini repair"
    ) as caught:
        pipeline.run(c, run_dir)
    last = f"to go on: scmini repair -o {run_dir} && scmini run all -o {run_dir}"
    assert str(caught.value).splitlines()[-1] == last
    assert caught.value.exit_code == 5


def test_the_store_can_be_elsewhere(
    tmp_path: Path, executed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCMINI_STORE", str(tmp_path / "large-disk"))
    pipeline.run(config("methods=[sft]"), tmp_path / "a" / "toy", only="data")
    assert (tmp_path / "a" / "toy" / "data" / "train.jsonl").is_file()
    assert len(list((tmp_path / "large-disk").glob("data-*"))) == 1


def test_peak_memory_and_device_are_noted(tmp_path: Path, executed: Any) -> None:
    pipeline.run(config("methods=[sft]"), tmp_path / "toy", only="data")
    name = json.loads((tmp_path / "toy" / "run.json").read_bytes())["stages"]["data"]["folder"]
    found = Store(tmp_path / ".store").load(name)
    assert found is not None
    assert found.manifest["notes"]["device"] == "cpu"
    assert 0.005 < found.manifest["notes"]["peak_gib"] < 4
    assert (found.path / "log" / "text.log").read_text() == "library noise of data\n"


def test_the_run_lock_is_free_afterwards(tmp_path: Path, executed: Any) -> None:
    pipeline.run(config("methods=[sft]"), tmp_path / "toy", only="data")
    with locked(tmp_path / "toy" / ".lock", "busy"):
        pass
