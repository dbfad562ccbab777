"""The folder in which a stage works: what a kill left in it, and what of that can be trusted.

    log/sessions.json    [start, end] of each time it was worked in
    log/forced           begun anew by --force
    log/seals.jsonl      sizes and sha256 of shards and checkpoints, put down as each is finished

What is in a shard is worth hours, and the manifest, which vouches for it, is written last of all.
So each is sealed when it is finished: a resume takes over only what still is as it was written.
"""

import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from scmini.console import warn
from scmini.durable import sha256_of, sync, write_atomic

MANIFEST = "manifest.json"
SESSIONS = "log/sessions.json"
FORCED = "log/forced"
SEALS = "log/seals.jsonl"
PASSING = (SESSIONS, FORCED)
"""Files of a work folder that a finished one has not."""
SUFFIX = ".partial"

Seals = dict[str, dict[str, Any]]
"""Names inside a folder -> {"bytes", "sha256"}."""


def reopen(partial: Path, *, anew: bool, finished: bool) -> None:
    """Make a work folder ready: torn and damaged files go, the time spent so far is kept.

    Args:
        anew: what was not begun this way does not count, if the stage is `finished`.
    """
    if anew and finished and partial.exists() and not (partial / FORCED).exists():
        shutil.rmtree(partial)
    forced = anew and not partial.exists()
    partial.mkdir(exist_ok=True)
    for torn in list(partial.rglob("*.tmp")):
        remove(torn)
    drop_damaged(partial)
    known = sessions(partial)
    (partial / MANIFEST).unlink(missing_ok=True)  # the work goes on: it will say something else
    (partial / "log").mkdir(exist_ok=True)
    write_atomic(partial / SESSIONS, json.dumps([*known, [time.time(), None]]).encode())
    if forced:
        (partial / FORCED).touch()


def sessions(partial: Path) -> list[list[float]]:
    """[start, end] of each time the folder was worked in.

    A killed process leaves no end; the time of the last write in the folder stands for it.
    """
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads((partial / SESSIONS).read_bytes())
        last = max(path.stat().st_mtime for path in partial.rglob("*"))
        ends = [(float(start), last if end is None else float(end)) for start, end in known]
        return [[start, max(start, end)] for start, end in ends]
    with suppress(OSError, ValueError, TypeError, KeyError):  # it was finished once
        return [[0.0, float(json.loads((partial / MANIFEST).read_bytes())["seconds"])]]
    return []


@contextmanager
def sealing(path: Path) -> Iterator[None]:
    """Write a shard, or a folder, of the stage that is at work; it counts once the block has ended.

    What a kill leaves in between is not taken over: nobody could say whether it is whole. Outside
    of a work folder it does nothing.
    """
    root = next((folder for folder in path.parents if folder.name.endswith(SUFFIX)), None)
    if root is None:
        yield
        return
    unit = path.relative_to(root).as_posix()
    _append(root, {"unit": unit, "files": None})
    yield
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    seals = {file.relative_to(root).as_posix(): seal_of(file) for file in files}
    _append(root, {"unit": unit, "files": seals})


def _append(root: Path, row: dict[str, Any]) -> None:
    (root / SEALS).parent.mkdir(exist_ok=True)
    with open(root / SEALS, "ab") as handle:
        handle.write(b"\n" + json.dumps(row).encode() + b"\n")  # the last one may be torn
        handle.flush()
        os.fsync(handle.fileno())


def seal_of(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def noted(folder: Path) -> Seals:
    """What was put down by `sealing`, the last word on each file."""
    units = _units(folder).values()
    return {name: seal for files in units for name, seal in (files or {}).items()}


def _units(folder: Path) -> dict[str, Seals | None]:
    """Unit -> seals of its files; None while it is being written."""
    units: dict[str, Seals | None] = {}
    with suppress(OSError):
        for line in (folder / SEALS).read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                row = json.loads(line)  # else torn by a kill
                files = row["files"]
                good = files and {n: seal for n, seal in files.items() if _is_seal(n, seal)}
                units[str(row["unit"])] = good
    return units


def drop_damaged(partial: Path) -> None:
    """Delete what is not as it was sealed, so that it is made anew."""
    for unit, files in _units(partial).items():
        if files is None and _is_inside(unit):
            remove(partial / unit)
    seals = noted(partial)
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        files = json.loads((partial / MANIFEST).read_bytes())["files"]  # killed while finishing
        seals |= {name: seal for name, seal in files.items() if _is_seal(name, seal)}
    for unit in damaged_units(partial, seals):
        if unit.split("/")[0] != "log":
            warn(f"{partial / unit}: changed after it was written; it is made anew")
        remove(partial / unit)


def damaged_units(folder: Path, seals: Seals) -> list[str]:
    """Units of which some file is missing or not as it was sealed; one that is gone whole is not.

    A unit is a file, or a folder with all that is in it: a checkpoint is of use only as a whole.
    """
    units = defaultdict(list)
    for name, seal in seals.items():
        units[unit_of(name)].append((folder / name, seal))
    return [
        unit
        for unit, files in sorted(units.items())
        if os.path.lexists(folder / unit) and not all(_is_intact(*file) for file in files)
    ]


def unit_of(name: str) -> str:
    """The unit to which a file of a stage's folder belongs."""
    first = PurePosixPath(name).parts[0]
    return name if first in ("log", "scratch") else first


def _is_intact(path: Path, seal: dict[str, Any]) -> bool:
    try:
        return path.is_file() and path.stat().st_size == seal["bytes"] and seal_of(path) == seal
    except OSError:  # a sector that cannot be read
        return False


def _is_seal(name: Any, seal: Any) -> bool:
    return isinstance(name, str) and _is_inside(name) and set(seal) == {*("bytes", "sha256")}


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def products(folder: Path) -> Iterator[Path]:
    """Every file and folder that a finished stage keeps, each synced."""
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.relative_to(folder).as_posix() not in PASSING:
            yield path
