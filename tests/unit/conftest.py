"""Fixtures of several files."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_stages import WORKER

from scmini import pipeline


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
