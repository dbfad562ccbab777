"""Puts the harness on the path, and says at the end how many faults were tried and survived."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_campaign import KINDS, Tally
from fault_disk import Disk

_TALLY = Tally()


@pytest.fixture(scope="session")
def tally() -> Tally:
    """Of all tests here."""
    return _TALLY


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """A disk that can be filled, where that is possible."""
    disk = Disk(tmp_path_factory.mktemp("faults") / "disk")
    yield disk
    disk.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of faults."""
    if not _TALLY.tried:
        return
    terminalreporter.section("faults")
    rows = [(kind, _TALLY.tried[kind], _TALLY.survived[kind]) for kind in KINDS]
    rows.append(("all", _TALLY.tried.total(), _TALLY.survived.total()))
    terminalreporter.write_line(f"{'kind':26} tried  survived")
    for kind, tried, survived in rows:
        words = f"{tried:5}  {survived:8}" if tried else "  none"
        terminalreporter.write_line(f"{kind:26} {words}")
    terminalreporter.write_line(
        f"steps of the store at which it was killed: {len(_TALLY.steps)}; faults that came when "
        f"all was done, and do not count: {_TALLY.missed.total()}"
    )
