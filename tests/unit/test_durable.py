"""A full or failing disk: said in words that help, and nothing finished is lost."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from scmini import durable
from scmini import store as store_module
from scmini.errors import EnvironmentProblem
from scmini.store import Recipe, Store

RECIPE = Recipe("dpo", "self-contrast-4", 1, {"dpo": {"beta": 0.1}})


@pytest.mark.parametrize("where", ["body", "commit", "library"])
def test_a_full_disk(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(EnvironmentProblem, match="disk is full"), store.building(RECIPE) as work:  # noqa: PT012
        assert work is not None
        (work.path / "shard").write_text("kept")
        if where == "body":
            raise full
        if where == "library":
            raise RuntimeError("SafetensorError: No space left on device (os error 28)")

        def fail(path: Path) -> None:
            raise full

        monkeypatch.setattr(store_module, "sha256_of", fail)
    monkeypatch.undo()
    with store.building(RECIPE) as work:
        assert work is not None
        assert (work.path / "shard").read_text() == "kept"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EIO, "input/output error"),
        (errno.EROFS, "read-only"),
        (errno.EFBIG, r"ulimit -f"),
        (errno.ESTALE, "network disk"),
        (errno.EDQUOT, "disk is full"),
        (errno.ENOENT, None),
    ],
)
@pytest.mark.parametrize("library", [False, True])
def test_a_failing_disk(tmp_path: Path, number: int, said: str | None, library: bool) -> None:
    """Libraries written in Rust raise errors of their own."""
    error: Exception = OSError(number, os.strerror(number), "/disk/shard")
    if library and number != errno.EDQUOT:
        error = RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")
    expected = EnvironmentProblem if said else type(error)
    with pytest.raises(expected, match=said), durable.disk_full_is_said(tmp_path):
        raise error


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_torch_on_a_full_disk(tmp_path: Path, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save does not say why its file is too short."""
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    monkeypatch.setattr(
        durable.shutil, "disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=free)
    )
    expected = EnvironmentProblem if free == 0 else RuntimeError
    with pytest.raises(expected), durable.disk_full_is_said(tmp_path):
        raise error
