"""Memory of the GPU and of a process, with a stand-in for nvidia-smi."""

import os
import time
from pathlib import Path

import pytest

from scmini.view import gauges
from scmini.view.gauges import Gauges


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that says what is in `answer` and writes its words into `asked`."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/answer\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("_EVERY_SECONDS", "_GPU_EVERY_SECONDS"):
        monkeypatch.setattr(gauges, name, 0.0)
    return tmp_path


def settled(made: Gauges, asked: Path) -> str:
    """What it says once nvidia-smi has answered."""
    made.text(None)
    assert made._process is not None
    made._process.wait(20)
    return made.text(None)


def test_gpu_memory_and_its_peak(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    made = Gauges()
    (smi / "answer").write_text("2048, 24564\n")
    assert settled(made, smi) == "GPU 2.0 GiB of 24.0 GiB (peak 2.0 GiB)"
    (smi / "answer").write_text("1024, 24564\n81, 24564\n")
    assert settled(made, smi) == "GPU 1.0 GiB of 24.0 GiB (peak 2.0 GiB)"
    made.new_task()
    assert settled(made, smi) == "GPU 1.0 GiB of 24.0 GiB (peak 1.0 GiB)"
    assert "--query-gpu=memory.used,memory.total --id=2" in (smi / "asked").read_text()
    made.close()


@pytest.mark.parametrize("answer", ["", "N/A, N/A\n", "[Not Supported], 24564\n", "No devices\n"])
def test_a_card_that_does_not_tell(smi: Path, answer: str) -> None:
    (smi / "answer").write_text(answer)
    made = Gauges()
    assert settled(made, smi) == ""
    made.text(None)
    assert len((smi / "asked").read_text().splitlines()) == 1


def test_nobody_waits_for_it(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (smi / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(gauges, "_GPU_PATIENCE", 0.0)
    made = Gauges()
    began = time.monotonic()
    for _ in range(3):
        assert made.text(None) == ""
    made.close()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_cards_are_not_asked(
    smi: Path, hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert Gauges().text(None) == ""
    assert not (smi / "asked").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = Gauges().text(os.getpid())
    assert text.startswith("memory ")
    assert text.endswith("iB)")
    assert Gauges().text(2**22 + 1) == ""
