"""Signals and kills while a stage works, and what is kept."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_stages import behave, config, states

from scmini import pipeline
from scmini.errors import StageFailed, StoreBusy
from scmini.run_folder import RunFolder
from scmini.view.running import read_progress


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


@pytest.fixture(params=["sleep"])
def asleep(request: Any, tmp_path: Path, executed: Any, monkeypatch: pytest.MonkeyPatch):
    """A run whose stage sft hangs: (process, run folder, configuration, pid of the stage)."""
    c, run_dir = config("methods=[sft]"), tmp_path / "toy"
    run_dir.mkdir()
    RunFolder(run_dir).begin(c, [])
    behave(monkeypatch, sft=request.param)
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
    assert f"scmini: stopped by {number.name}; 2 of 6 tasks are finished" in error
    assert "stopping; progress is kept" in error
    assert error.endswith(f"to go on: scmini run all -o {run_dir}\n")
    assert not is_alive(stage)
    row = next(r for r in pipeline.status(c, run_dir)["stages"] if r["name"] == "sft")
    assert (row["state"], row["reason"]) == ("missing", "begun; goes on from what it kept")
    executed()
    pipeline.run(c, run_dir)
    assert executed() == ["sft", "generate:sft", "reward:sft", "report"]
    assert (run_dir / "sft" / "shard-0").read_text() == "half of the work"


@pytest.mark.parametrize("asleep", ["stubborn"], indirect=True)
def test_a_second_signal_ends_it_at_once(asleep: Any, tmp_path: Path) -> None:
    process, run_dir, c, stage = asleep
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping; progress is kept" not in process.stderr.readline():
        pass
    assert is_alive(stage)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - began < 8, "it did not wait for the stage"
    assert process.returncode == 6
    assert error.endswith(f"to go on: scmini run all -o {run_dir}\n")
    assert not is_alive(stage)
    assert sorted(path.name for path in run_dir.glob(".*")) == []
    assert states(pipeline.status(c, run_dir))["sft"] == "missing"


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
    with pytest.raises(StoreBusy, match="another scmini run is working in") as busy:
        pipeline.run(c, run_dir)
    last = str(busy.value).splitlines()[-1]
    assert last == f"to watch it: scmini status --watch -o {run_dir}"
    wait_for(lambda: "sft" in str(read_progress(run_dir)))  # what it tells was not disturbed
    with pytest.raises(StageFailed, match="being built by another process") as caught:
        pipeline.run(c, tmp_path / "beside")
    assert caught.value.exit_code == 3
