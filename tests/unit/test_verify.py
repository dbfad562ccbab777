"""`scmini verify` as a command: its process, its table, its JSON and its exit codes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scmini import cli, verify
from scmini.verification.kernels import ATTENTION, HEAD
from scmini.verification.session import interpreter_is_missing

MODEL_CHECKS = [
    "packed = separate sequences",
    "whole step = step in micro-batches",
    "step-0 rewards = 0",
]
SABOTAGED = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch, torch.nn.functional as F
from scmini.models import attention
from scmini.verification import __main__, session

def causal(q, k, v, tree, **options):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

behaviour = sys.argv[1]
if behaviour == "wrong":
    attention.tree_attention = causal
elif behaviour == "die":
    attention.tree_attention = lambda *_, **__: os.abort()
elif behaviour == "broken":
    session.versions = lambda: 1 / 0
elif behaviour == "pause":
    import time
    session.versions = lambda: time.sleep(600)
some = session.kernel_checks
session.kernel_checks = lambda *a, **k: some(*a, **k)[-1:]
sys.exit(__main__.main(json.loads(sys.argv[2])))
"""


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    found = [{"error": 1e-7, "allowed": 2e-7, "passed": True, "message": "", **r} for r in rows]
    passed = all(row["passed"] is not False for row in found)
    return {"device": "cpu", "model": "m", "versions": {}, "checks": found, "passed": passed}


FAILED = {"name": "b", "implementation": "torch", "dtype": "float32", "error": 3.0, "passed": False}
PASSED = {"name": "a", "implementation": "torch", "dtype": "float32"}
SKIPPED = {**PASSED, "name": "c", "error": None, "allowed": None, "passed": None}


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the process of the checks misbehave, and do few of them."""
    (tmp_path / "worker.py").write_text(SABOTAGED)

    def use(behaviour: str) -> None:
        command = [sys.executable, str(tmp_path / "worker.py"), behaviour]
        monkeypatch.setattr(verify, "WORKER", command)

    return use


def test_passes_on_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    assert cli.main(["verify", "--device", "cpu", "--json"]) == 0
    assert time.monotonic() - begin < 300, "a minute on a free machine"
    out, error = capfd.readouterr()
    found = json.loads(out)
    assert set(found) == {"device", "model", "versions", "checks", "passed"}
    assert (found["device"], found["model"], found["passed"]) == ("cpu", "tiny random Llama", True)
    assert found["versions"]["torch"] == torch.__version__
    assert "verify: starts" in error
    names = {"name", "implementation", "dtype", "error", "allowed", "passed", "message"}
    assert all(set(row) == names for row in found["checks"])
    seen = {(row["name"].partition(":")[0], row["implementation"]) for row in found["checks"]}
    operations = [*(f"tree_attention, {n}" for n in ATTENTION)]
    operations += [f"linear_logprob, {n}" for n in HEAD]
    ways = ["torch", "triton, interpreted"]
    assert seen == {
        *((name, "torch") for name in MODEL_CHECKS),
        *((name, way) for name in operations for way in ways),
    }
    why_not = interpreter_is_missing()
    for row in found["checks"]:
        if row["implementation"] == "torch" or not why_not:
            assert row["passed"] is True
            assert 0 <= row["error"] <= row["allowed"] < 0.01
        else:
            assert row["passed"] is None
            assert row["message"] == why_not


def test_a_wrong_operation_exits_1_with_a_whole_table(
    sabotage: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    sabotage("wrong")
    assert cli.main(["verify", "--device", "cpu"]) == 1
    out, error = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == list(verify.HEAD)
    assert any("packed = separate" in line and line.endswith("fail") for line in lines)
    assert any("linear_logprob" in line and line.endswith("pass") for line in lines)
    assert lines[-1].startswith("cpu, tiny random Llama: ")
    assert "scmini: verification failed" in error
    assert "Traceback" not in error


def test_a_process_that_dies_in_a_check_is_a_failed_check(
    sabotage: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    sabotage("die")
    assert cli.main(["verify", "--device", "cpu", "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["passed"] is False
    assert found["checks"][-1]["name"] == MODEL_CHECKS[0]
    assert found["checks"][-1]["message"].startswith("the process ended with SIGABRT")


def test_a_process_that_never_begins_is_an_error(
    sabotage: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    sabotage("broken")
    assert cli.main(["verify", "--device", "cpu"]) == 1
    out, error = capfd.readouterr()
    assert out == ""
    assert "scmini: ZeroDivisionError: division by zero\n  | Traceback" in error


def test_the_process_ends_with_its_parent(sabotage: Callable[[str], None], tmp_path: Path) -> None:
    sabotage("pause")
    request = json.dumps({"device": "cpu", "model": None})
    process = subprocess.Popen(
        [*verify.WORKER, request],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdin is not None
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(120) == 6


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--device", "gpu"], 2, "invalid choice: 'gpu'"),
        (["--modle", "x"], 2, "did you mean --model?"),
        (["--model", "/no/such"], 5, "--model: the folder /no/such does not exist"),
        (["--model", "./empty"], 5, "--model: empty: no weights in safetensors; name the folder"),
    ],
)
def test_exit_codes(
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["verify", *words]) == code
    out, error = capfd.readouterr()
    assert out == ""
    assert said in error
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_cuda_exits_3(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--device", "cuda"]) == 3
    assert "finds no CUDA device" in capfd.readouterr().err


def test_skipped_is_neither_passed_nor_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = {**SKIPPED, "message": "triton is not installed"}
    monkeypatch.setattr(verify, "verify", lambda *_: document(PASSED, skipped, skipped))
    assert cli.main(["verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["a", "torch", "float32", "1.00e-07", "2.00e-07", "pass"]
    assert lines[2].split() == ["c", "torch", "float32", "skipped"]
    assert lines[4] == "c (torch, float32) and 1 more: triton is not installed"
    assert lines[5] == "cpu, m: 1 passed, 2 skipped"


def test_the_table_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {**FAILED, "message": "[red]\x1b[2J boom"}
    monkeypatch.setattr(verify, "verify", lambda *_: document(PASSED, failed, SKIPPED))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "┃" in out
    assert "3.00e+00" in out
    assert "b (torch, float32): [red] boom" in out
    assert "1 passed, 1 failed, 1 skipped" in out
    assert "\x1b[2J" not in out
