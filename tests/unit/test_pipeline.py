"""The stage graph and the runner, with small stand-ins for the stages in real child processes."""

import ast
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scmini import pipeline, run_folder
from scmini.config import Config
from scmini.config_file import parse_config
from scmini.errors import DataError, EnvironmentProblem, StageFailed, StoreBusy, UsageError
from scmini.locks import locked
from scmini.run_folder import RunFolder
from scmini.stage_graph import STAGES, Task, folder_digest, inputs, sections, tasks
from scmini.store import Store

WORKER = '''
"""A worker whose stages write a digest of what they read instead of thinking."""
import hashlib, json, os, sys, time
from pathlib import Path
from scmini import console, worker
from scmini.config import Section, is_trained_by_dpo, num_negatives, recipe_section
from scmini.errors import DataError
from scmini.stage_graph import Task, inputs, sections

def digest_of_all(config, folders, work, task):
    seen = [recipe_section(getattr(config, name)) for name in sections(task)] + [work.method]
    for key, source in sorted(inputs(config, task).items()):
        for pattern in source.patterns:
            for path in sorted(folders[key].glob("**/*" if pattern == "*" else pattern)):
                if path.is_file() and path.name not in ("manifest.json", "metrics.jsonl"):
                    seen.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

def load(name):
    def run(config, folders, work):
        task = Task(name, work.method)
        text = digest_of_all(config, folders, work, task)
        log = Path(os.environ["FAKE_LOG"])
        with open(log, "a") as handle:
            handle.write(f"{task.key} {os.getpid()}\\n")
        print("library noise of", task.key)
        behave(task, config, work)
        def write(path, content=text):
            (work.path / path).parent.mkdir(parents=True, exist_ok=True)
            (work.path / path).write_text(content)
        for path in FILES[name]:
            write(path)
        if name == "filter":
            for method in config.methods:
                if is_trained_by_dpo(method):
                    write(f"pairs/{method}.jsonl", text + method)
        if name == "reference":
            for path in (folders["filter"] / "pairs").iterdir():
                write(f"by-method/{path.stem}.parquet", path.read_text())
        console.progress(1, 1, "steps", loss=0.5)
    return run

FILES = {
    "data": ["train.jsonl", "test.jsonl", "corpus.jsonl"], "base": ["model/config.json"],
    "sft": ["adapter/a", "metrics.jsonl"], "sample": ["part-00000.parquet"],
    "embed": ["part-00000.npy"], "filter": ["similarity/part-0.parquet", "used.jsonl"],
    "reference": ["logps.parquet"], "dpo": ["adapter/a"], "generate": ["generations.jsonl"],
    "reward": ["rewards.jsonl"], "report": ["index.html", "results.json"],
}

def behave(task, config, work):
    what = json.loads(os.environ.get("FAKE_BEHAVIOUR", "{}")).get(task.key)
    if what == "crash":
        raise RuntimeError("out \\x1b[31mof ideas")
    if what == "data":
        raise DataError("rows.jsonl, line 3: field 'id' is missing")
    if what == "memory":
        raise MemoryError
    if what == "import":
        import package_that_is_not_there
    if what == "segfault":
        os.kill(os.getpid(), 11)
    if what == "sleep" and not (work.path / "shard-0").exists():
        (work.path / "shard-0").write_text("half of the work")
        console.say("asleep")
        time.sleep(60)

worker.load_stage = load
sys.exit(worker.main(Path(sys.argv[1])))
'''
METHODS = ["sft", "sft-continued", "dpo", "self-contrast-1", "self-contrast-4"]


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Puts the stand-ins in place; the function returns the keys executed since its last call."""
    (tmp_path / "worker.py").write_text(WORKER)
    log = tmp_path / "executed"
    log.touch()
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.delenv("FAKE_BEHAVIOUR", raising=False)
    monkeypatch.delenv("SCMINI_STORE", raising=False)
    monkeypatch.setattr(pipeline, "WORKER", [sys.executable, str(tmp_path / "worker.py")])

    def take() -> list[str]:
        keys = [line.split()[0] for line in log.read_text().splitlines()]
        log.write_text("")
        return keys

    return take


def config(*overrides: str) -> Config:
    return parse_config("", "x", [f"methods={json.dumps(METHODS)}", "name=toy", *overrides])


def states(found: dict[str, Any]) -> dict[str, str]:
    keys = (Task(row["name"], row["method"]).key for row in found["stages"])
    return dict(zip(keys, (row["state"] for row in found["stages"]), strict=True))


def behave(monkeypatch: pytest.MonkeyPatch, **how: str) -> None:
    monkeypatch.setenv(
        "FAKE_BEHAVIOUR", json.dumps({k.replace("__", ":"): v for k, v in how.items()})
    )


def test_tasks_that_a_configuration_needs() -> None:
    def keys(*overrides: str) -> list[str]:
        return [task.key for task in tasks(parse_config("", "x", overrides))]

    ends = ["generate:{}", "reward:{}"]
    sft = [end.format("sft") for end in ends]
    assert keys("methods=[sft]") == ["data", "base", "sft", *sft, "report"]
    named = ["model.model_name_or_path=m", "methods=[sft]"]
    assert keys(*named) == ["data", "sft", *sft, "report"]
    dpo = ["filter", "reference", "dpo:dpo", *(end.format("dpo") for end in ends)]
    assert keys("methods=[dpo]") == ["data", "base", "sft", *dpo, "report"]
    assert keys("methods=[spin, sft-continued, sft-temperature-0.3]") == [
        *(
            "data",
            "base",
            "sft",
            "sft:sft-continued",
            "sample",
            "embed",
            "filter",
            "reference",
            "dpo:spin",
        ),
        *(
            f"{end.format(m)}"
            for end in ends
            for m in ("spin", "sft-continued", "sft-temperature-0.3")
        ),
        "report",
    ]


def test_inputs_name_the_files_that_are_read() -> None:
    c = config()
    dpo = inputs(c, Task("dpo", "self-contrast-4"))
    assert list(dpo) == ["data", "base", "sft", "sample", "filter", "reference"]
    assert dpo["filter"].patterns == ("pairs/self-contrast-4.jsonl",)
    assert dpo["reference"].patterns == ("by-method/self-contrast-4.parquet",)
    assert inputs(c, Task("dpo", "dpo"))["sample"].patterns == ()
    policies = {m: inputs(c, Task("generate", m))["policy"].task.key for m in METHODS}
    assert policies == {
        "sft": "sft",
        "sft-continued": "sft:sft-continued",
        "dpo": "dpo:dpo",
        "self-contrast-1": "dpo:self-contrast-1",
        "self-contrast-4": "dpo:self-contrast-4",
    }
    assert inputs(c, Task("reward", "sft"))["base"].patterns == ()
    report = inputs(c, Task("report"))
    assert {f"{kind}:{m}" for kind in ("train", "generate", "reward") for m in METHODS} < set(
        report
    )
    assert report["train:sft"].task == Task("sft")


def test_every_task_comes_after_what_it_reads() -> None:
    found = tasks(config())
    for number, task in enumerate(found):
        assert all(source.task in found[:number] for source in inputs(config(), task).values())


STAGE_FILES = sorted((Path(pipeline.__file__).parent / "stages").glob("[a-z]*.py"))


@pytest.mark.parametrize("path", STAGE_FILES, ids=lambda path: path.stem)
def test_a_stage_reads_no_setting_that_its_recipe_lacks(path: Path) -> None:
    """Else a change of that setting would not run the stage again."""
    read = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "config"
    }
    allowed = {*sections(Task(path.stem)), *sections(Task(path.stem, "sft-continued"))}
    allowed |= {"seed"} if STAGES[path.stem].seeded else set()
    allowed |= {"filter": {"methods"}, "base": {"grader", "reward"}, "reward": {"grader"}}.get(
        path.stem, set()
    )
    allowed |= {"data": {"model"}}.get(path.stem, set())  # whether a model is named
    # Only to ask whether a program can grade; another format is another train.jsonl as well.
    allowed |= {"filter": {"data"}}.get(path.stem, set())
    if path.stem != "report":
        assert read & set(Config.model_fields) <= allowed


def test_a_whole_run_and_what_a_change_runs_again(
    tmp_path: Path, executed: Any, capsys: Any
) -> None:
    run_dir = tmp_path / "runs" / "toy"
    pipeline.run(config(), run_dir)
    everything = [task.key for task in tasks(config())]
    assert executed() == everything
    assert set(states(pipeline.status(config(), run_dir)).values()) == {"done"}
    error = capsys.readouterr().err
    assert "dpo self-contrast-4: 1/1 steps, loss 0.5" in error

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


def test_one_process_per_stage(tmp_path: Path, executed: Any) -> None:
    pipeline.run(config(), tmp_path / "toy")
    processes: dict[str, set[str]] = {}
    for line in Path(os.environ["FAKE_LOG"]).read_text().splitlines():
        key, pid = line.split()
        processes.setdefault(pid, set()).add(key)
    groups = list(processes.values())
    assert {"dpo:dpo", "dpo:self-contrast-1", "dpo:self-contrast-4"} in groups
    assert all(len({key.split(":")[0] for key in group}) == 1 for group in groups)
    assert len(groups) == len(STAGES) + 1  # sft-continued reads the adapter that sft makes


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
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    behave(monkeypatch, data="data")
    monkeypatch.setattr(RunFolder, "fail", full)
    with pytest.raises(StageFailed, match="field 'id' is missing") as caught:
        pipeline.run(c, run_dir)
    assert caught.value.exit_code == 5
    monkeypatch.setattr(RunFolder, "begin", full)
    with pytest.raises(EnvironmentProblem, match="toy: the disk is full"):
        pipeline.run(c, run_dir)


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


def start(tmp_path: Path, run_dir: Path) -> "subprocess.Popen[str]":
    """`pipeline.run` in a process of its own."""
    script = (
        "import sys; from pathlib import Path; from scmini import pipeline, cli\n"
        "from scmini.config_file import load_config\n"
        f"pipeline.WORKER = [sys.executable, {str(tmp_path / 'worker.py')!r}]\n"
        f"sys.exit(cli.main(['run', 'all', '-o', {str(run_dir)!r}]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def asleep(tmp_path: Path, executed: Any, monkeypatch: pytest.MonkeyPatch):
    """A run whose stage sft hangs: (process, run folder, configuration, pid of the stage)."""
    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    run_dir.mkdir()
    RunFolder(run_dir).begin(c, [])
    behave(monkeypatch, sft="sleep")
    process = start(tmp_path, run_dir)
    wait_for(lambda: any((tmp_path / ".store").glob(".sft-*.partial/shard-0")))
    behave(monkeypatch)
    stage = int(Path(os.environ["FAKE_LOG"]).read_text().splitlines()[-1].split()[1])
    yield process, run_dir, c, stage
    if process.poll() is None:
        process.kill()
    process.communicate()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_keeps(asleep: Any, executed: Any, number: signal.Signals) -> None:
    process, run_dir, c, stage = asleep
    assert states(pipeline.status(c, run_dir))["sft"] == "running"
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 6
    assert f"stopped by {number.name}. Kept: 2 of 6 tasks" in error
    assert f"scmini run all -o {run_dir}" in error
    assert not is_alive(stage)
    row = next(r for r in pipeline.status(c, run_dir)["stages"] if r["name"] == "sft")
    assert (row["state"], row["reason"]) == ("missing", "begun; goes on where it was")
    executed()
    pipeline.run(c, run_dir)
    assert executed() == ["sft", "generate:sft", "reward:sft", "report"]
    assert (run_dir / "sft" / "shard-0").read_text() == "half of the work"


def test_killing_the_parent_ends_the_stage(asleep: Any, executed: Any) -> None:
    process, run_dir, c, stage = asleep
    process.kill()
    wait_for(lambda: not is_alive(stage))
    executed()
    pipeline.run(c, run_dir)
    assert executed() == ["sft", "generate:sft", "reward:sft", "report"]


def test_killing_the_stage(asleep: Any) -> None:
    process, _, _, stage = asleep
    os.kill(stage, signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 6
    assert "sft: killed (SIGKILL)" in error


def test_a_second_run_of_the_same_is_busy(asleep: Any, tmp_path: Path) -> None:
    _, run_dir, c, _ = asleep
    with pytest.raises(StoreBusy, match="another scmini run is working in"):
        pipeline.run(c, run_dir)
    with pytest.raises(StageFailed, match="being built by another process") as caught:
        pipeline.run(c, tmp_path / "beside")
    assert caught.value.exit_code == 3


def test_a_damaged_input_is_named(tmp_path: Path, executed: Any) -> None:
    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    pipeline.run(c, run_dir, until="base")
    (run_dir / "data" / "train.jsonl").write_text("half")
    with pytest.raises(
        StageFailed, match=r"train\.jsonl: changed after it was written; delete"
    ) as caught:
        pipeline.run(c, run_dir)
    assert caught.value.exit_code == 5


def test_data_files_count_by_content(tmp_path: Path, executed: Any) -> None:
    path = tmp_path / "rows.jsonl"
    c = config("methods=[sft]", "data.format=jsonl", f"data.path={path}")
    with pytest.raises(DataError, match=r"data\.path: .*rows\.jsonl: No such file"):
        pipeline.run(c, tmp_path / "toy")
    assert states(pipeline.status(c, tmp_path / "toy"))["data"] == "failed"
    path.write_text("1")
    pipeline.run(c, tmp_path / "toy", until="data")
    os.utime(path, (1, 1))
    assert states(pipeline.status(c, tmp_path / "toy"))["data"] == "done"
    path.write_text("2")
    row = pipeline.status(c, tmp_path / "toy")["stages"][0]
    assert (row["state"], row["reason"]) == ("stale", f"data.path {path} changed")


def test_digest_of_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(hashlib.sha256(b"x").digest() * (5 * 32768 + 7))
    (tmp_path / "model.safetensors").write_bytes(weights)
    seen = {folder_digest(tmp_path)}
    for change in (0, len(weights) - 1):
        changed = bytearray(weights)
        changed[change] ^= 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        seen.add(folder_digest(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(weights + b"1")
    seen.add(folder_digest(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    seen.add(folder_digest(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    seen.add(folder_digest(tmp_path))
    assert len(seen) == 6


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


@pytest.mark.parametrize("key", ["reward.model_name_or_path", "embed.encoder"])
def test_a_missing_folder_is_said_before_anything_runs(key: str, tmp_path: Path) -> None:
    grader = ["reward.grader=model"] if key.startswith("reward") else []
    wrong = config(f"{key}=/no/such/model", *grader)
    with pytest.raises(DataError, match=rf"{key}: the folder /no/such/model does not exist"):
        pipeline.run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
