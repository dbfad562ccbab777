"""Fixtures of several files. What only some of them need is imported where it is used."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_stages import put_in_place


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Puts the stand-ins in place; the function returns the keys executed since its last call."""
    log = put_in_place(tmp_path, monkeypatch)

    def take() -> list[str]:
        keys = [line.split()[0] for line in log.read_text().splitlines()]
        log.write_text("")
        return keys

    return take


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model, with its tokenizer."""
    from training_helpers import write_model

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for `source`, of random weights."""
    from export_helpers import config, save_random_adapter

    return save_random_adapter(config(source), str(source), tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))
