"""What is still good of a damaged finished stage.

A stage that goes on from shards and checkpoints loses those that are damaged, and no more: the
folder becomes a work folder again, and the next run makes what is missing. Where the damage is in
files that nobody reads, the stage stays finished without them.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from scmini.durable import sync, write_atomic
from scmini.partial import MANIFEST, SEALS, Seals, damaged_units, noted, unit_of

Outcome = Literal["whole", "rest goes on", "not needed"]
GOES_ON = ("base", "sft", "sample", "embed", "dpo")
"""Stages that go on from the shards or checkpoints that they find."""


def set_aside(
    folder: Path, to: Path, partial: Path, manifest: dict[str, Any] | None, damaged: Collection[str]
) -> Outcome:
    """Move what is damaged to `to`, and keep the rest if that saves work.

    A kill at any moment leaves a folder that is finished, damaged, or one to go on with.

    Args:
        folder: of a finished stage.
        partial: where its stage works.
        manifest: None if it is damaged itself; shards and checkpoints are vouched for without it.
        damaged: names of the damaged files in `folder`.

    Returns:
        What became of the stage: `whole`: nothing is kept; `rest goes on`: of the good part, when
        the stage is run again; `not needed`: it is finished, without logs and checkpoints.
    """
    bad = {unit_of(name) for name in damaged}
    if manifest is not None and all(map(_is_idle, bad)):
        kept = {n: seal for n, seal in manifest["files"].items() if unit_of(n) not in bad}
        _move(folder, sorted(bad), to)
        text = json.dumps({**manifest, "files": kept}, indent=1, allow_nan=False)
        write_atomic(folder / MANIFEST, text.encode())
        return "not needed"
    seals: Seals = noted(folder) if manifest is None else manifest["files"]
    if manifest is None:
        bad |= {MANIFEST, *damaged_units(folder, seals)}
    good = {unit_of(name) for name in seals} - bad
    stage = folder.name.split("-")[0]
    if stage not in GOES_ON or partial.exists() or all(unit.startswith("log/") for unit in good):
        os.rename(folder, to)
        return "whole"
    there = {unit_of(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file()}
    _move(folder, sorted(there - good - {MANIFEST, SEALS} | (there & bad)), to)
    os.rename(folder, partial)
    sync(folder.parent)
    return "rest goes on"


def _is_idle(unit: str) -> bool:
    """Whether nobody reads it once the stage is finished."""
    return unit.startswith(("log/", "checkpoint-"))


def _move(folder: Path, units: list[str], to: Path) -> None:
    to.mkdir()
    for unit in units:
        if os.path.lexists(folder / unit):
            (to / unit).parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder / unit, to / unit)
    sync(to)
    sync(folder)
