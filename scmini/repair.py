"""`scmini repair`: read the finished stages of a run again, and set aside what is damaged.

Sizes come first, as they take no time; then every file is read. What is damaged is renamed, never
deleted, and `scmini run` makes it anew: of a stage that goes on from shards or checkpoints no more
than that (scmini/salvage.py). What follows stays valid if the same files come out.
"""

import errno
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from scmini.config import Config
from scmini.config_file import load_config
from scmini.console import say, size, table
from scmini.display import Display
from scmini.errors import ScminiError, StoreBusy, UsageError
from scmini.locks import is_locked, locked
from scmini.pipeline import store_root
from scmini.run_folder import RunFolder
from scmini.salvage import Outcome, set_aside
from scmini.stage_graph import Task, inputs, recipe, tasks
from scmini.store import MANIFEST, Finished, Recipe, Store, digest, sha256_of

Fault = Literal["missing", "size", "content", "unreadable"]
_SHOWN = 12


@dataclass(frozen=True)
class DamagedFile:
    """A file that is not as its manifest says."""

    stages: list[str]
    """Labels of the stages that it belongs to."""
    path: Path
    fault: Fault
    detail: str = ""


@dataclass(frozen=True)
class SetAside:
    """What was damaged of a folder of the store."""

    stages: list[str]
    folder: Path
    to: Path
    outcome: Outcome
    """What became of the rest."""


@dataclass
class Repair:
    """What was found, and what was done about it."""

    run_dir: Path
    dry_run: bool
    stages: int = 0
    """Finished stages that were checked."""
    files: int = 0
    bytes: int = 0
    """Of the files whose content was read."""
    damaged: list[DamagedFile] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Folders that another process builds, or replaced while they were read."""
    run_again: list[str] = field(default_factory=list)
    """Labels of the stages that the run lacks: damaged ones, and those whose folder is gone."""
    own_config: bool = True
    """Whether the configuration is that of the run folder."""

    @property
    def command(self) -> str:
        """Makes again what is not there."""
        return f"scmini run all -o {shlex.quote(str(self.run_dir))}"


@dataclass
class _Folder:
    """A folder of the store that some tasks of the run need or link to."""

    path: Path
    tasks: list[Task]
    current: bool = False
    """Whether the configuration needs it, and not only a link of the run folder."""
    seen: bytes | None = None
    """The manifest against which the files were checked."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: Finished | None = None
    damaged: list[DamagedFile] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return [task.label for task in self.tasks]

    def complain(self, path: Path, fault: Fault, detail: str = "") -> None:
        self.damaged.append(DamagedFile(self.labels, path, fault, detail))


def repair(config: Config, run_dir: Path, *, dry_run: bool = False) -> Repair:
    """Check every file of a run's finished stages, and set damaged stages aside.

    Checked are the stages that the configuration names, and those that run.json names: where a
    manifest cannot be read, it alone knows what follows. What is damaged of a folder of the store
    becomes `<name>.damaged-N`, and the links of the run folder that lead into it are taken away.

    Args:
        dry_run: only look; nothing is renamed, and a run may go on meanwhile.

    Raises:
        UsageError: there is no such run folder.
        StoreBusy: a `scmini run` is working in it.
    """
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir}: no such run folder")
    if dry_run:
        return _repair(config, run_dir, dry_run=True)
    busy = f"a scmini run is working in {run_dir}; wait for its end, or only look with --dry-run"
    with locked(run_dir / ".lock", busy):
        return _repair(config, run_dir, dry_run=False)


def _repair(config: Config, run_dir: Path, *, dry_run: bool) -> Repair:
    store, record = Store(store_root(run_dir)), RunFolder(run_dir)
    done = Repair(run_dir, dry_run, own_config=_is_own(config, run_dir))
    folders, gone = _folders(config, store, record)
    checked = []
    for folder in folders:
        if is_locked(store.lock(folder.path.name)):
            done.skipped.append(folder.path.name)
        else:
            checked.append(folder)
    _check(checked, done)
    lacking = {task.label for task in gone}
    for folder in checked:
        if not folder.damaged:
            continue
        aside = None if dry_run else _set_aside(store, record, folder)
        if aside is None and not dry_run:
            done.skipped.append(folder.path.name)
            continue
        done.damaged += folder.damaged
        if aside is not None:
            done.set_aside.append(aside)
        if folder.current and not (aside and aside.outcome == "not needed"):
            lacking.update(folder.labels)
    done.run_again = [task.label for task in tasks(config) if task.label in lacking]
    return done


def _is_own(config: Config, run_dir: Path) -> bool:
    path = run_dir / "config.yaml"
    with suppress(ScminiError, OSError):
        return path.is_file() and load_config(str(path)) == config
    return False


def _folders(config: Config, store: Store, record: RunFolder) -> tuple[list[_Folder], list[Task]]:
    """The folders to check, and the tasks whose folder the run once had and has no more."""
    folders: dict[str, _Folder] = {}
    gone: list[Task] = []
    finished: dict[Task, Finished] = {}
    for task in tasks(config):
        named, wanted = _named(record, task), _wanted(config, task, finished)
        if named and wanted in (named, None) and not os.path.lexists(store.root / named):
            gone.append(task)
        for name in dict.fromkeys(name for name in (wanted, named) if name):
            path = store.root / name
            if not os.path.lexists(path):
                continue
            if name not in folders:
                folders[name] = _Folder(path, [])
                _read_manifest(folders[name])
            folder = folders[name]
            folder.tasks.append(task)
            folder.current |= name == (wanted or named)
            if name == wanted and folder.found is not None:
                finished[task] = folder.found
    for folder in folders.values():  # a fault of the manifest was found before all tasks were known
        folder.damaged = [
            DamagedFile(folder.labels, each.path, each.fault, each.detail)
            for each in folder.damaged
        ]
    return list(folders.values()), gone


def _named(record: RunFolder, task: Task) -> str | None:
    """The folder that run.json names, unless somebody wrote something else there."""
    name = record.entry(task).get("folder")
    plain = isinstance(name, str) and name == Path(name).name and name not in (".", "..")
    return name if plain else None


def _wanted(config: Config, task: Task, finished: dict[Task, Finished]) -> str | None:
    """The folder of the task's recipe, where the manifests of all that it reads are legible."""
    if any(each.task not in finished for each in inputs(config, task).values()):
        return None
    try:
        return recipe(config, task, finished).folder
    except ScminiError:  # a file from outside is not there any more
        return None


def _read_manifest(folder: _Folder) -> None:
    path = folder.path / MANIFEST
    try:
        folder.seen = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return folder.complain(path, "missing")
    except OSError as error:
        return folder.complain(path, "unreadable", _bad_disk(error))
    try:
        manifest = json.loads(folder.seen)
        Recipe(**manifest["recipe"])
        files = manifest["files"]
        right = folder.path.name.endswith("-" + digest(manifest["recipe"])[:12])
        right &= all(_is_seal(name, seal) for name, seal in files.items())
        found = Finished(folder.path, manifest)
        right &= found.seconds >= 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        return folder.complain(path, "content")
    folder.files, folder.found = files, found
    return None


def _is_seal(name: str, seal: dict[str, Any]) -> bool:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and type(seal["bytes"]) is int and isinstance(seal["sha256"], str)


def _bad_disk(error: OSError) -> str:
    """The words of an error that means a broken file; others, as of permissions, go on up."""
    if error.errno not in (errno.EIO, errno.EUCLEAN, errno.EBADMSG):
        raise error
    return error.strerror or str(error)


def _check(folders: list[_Folder], done: Repair) -> None:
    """Compare all sizes, then read what has the right size; faults are told as they are found."""
    with Display() as display:
        for folder in folders:
            for fault in folder.damaged:
                display.line(_line(fault))
        readable = list(_right_sizes(folders, display))
        total = sum(seal["bytes"] for _, _, seal in readable)
        read = 0
        if readable:
            display.start("check")
        for folder, path, seal in readable:
            display.progress("check", _progress(read, total, folder))
            try:
                if sha256_of(path) != seal["sha256"]:
                    folder.complain(path, "content")
            except FileNotFoundError:
                folder.complain(path, "missing")
            except OSError as error:
                folder.complain(path, "unreadable", _bad_disk(error))
            if folder.damaged and folder.damaged[-1].path == path:
                display.line(_line(folder.damaged[-1]))
            read += seal["bytes"]
        if readable:
            display.finish("check", f"{len(readable)} files, {size(total)} read")
    done.stages = sum(len(folder.tasks) for folder in folders)
    done.files = sum(len(folder.files) for folder in folders)
    done.bytes = total


def _right_sizes(
    folders: list[_Folder], display: Display
) -> Iterator[tuple[_Folder, Path, dict[str, Any]]]:
    """Files that are there with the size they should have; the others become faults."""
    for folder in folders:
        for name, seal in folder.files.items():
            path = folder.path / name
            try:
                there = path.stat().st_size if path.is_file() else None
            except OSError as error:
                folder.complain(path, "unreadable", _bad_disk(error))
            else:
                if there == seal["bytes"]:
                    yield folder, path, seal
                    continue
                fault: Fault = "missing" if there is None else "size"
                detail = "" if there is None else f"{there} bytes, should have {seal['bytes']}"
                folder.complain(path, fault, detail)
            display.line(_line(folder.damaged[-1]))


def _progress(read: int, total: int, folder: _Folder) -> dict[str, Any]:
    scale = 1 << 20
    figures = {"in": folder.labels[0]}
    return {"done": read // scale, "total": -(-total // scale), "unit": "MiB", "figures": figures}


def _set_aside(store: Store, record: RunFolder, folder: _Folder) -> SetAside | None:
    """Rename what is damaged; None if another process has it, or has made it anew by now."""
    path = folder.path
    try:
        with locked(store.lock(path.name), f"{path.name} is being built by another process"):
            now = None
            with suppress(OSError):
                now = (path / MANIFEST).read_bytes()
            if now != folder.seen:
                return None
            # Left by a kill in the middle of its deletion; without the folder it would come back.
            shutil.rmtree(store.replaced(path.name), ignore_errors=True)
            for task in folder.tasks:
                record.unlink(task, path)
            names = (path.with_name(f"{path.name}.damaged-{n}") for n in itertools.count(1))
            to = next(name for name in names if not os.path.lexists(name))
            bad = [each.path.relative_to(path).as_posix() for each in folder.damaged]
            manifest = folder.found.manifest if folder.found else None
            outcome = set_aside(path, to, store.partial_of(path.name), manifest, bad)
            if outcome == "not needed" and folder.found:
                for task in folder.tasks:
                    record.finish(task, folder.found)
            say(f"set aside: {_OUTCOMES[outcome]} of {path} as {to.name}")
            return SetAside(folder.labels, path, to, outcome)
    except StoreBusy:
        return None


_OUTCOMES = {
    "whole": "all",
    "rest goes on": "the damaged part",
    "not needed": "what is not needed any more",
}


def _line(fault: DamagedFile) -> str:
    words = {
        "missing": "missing",
        "size": "wrong size",
        "content": "changed after it was written",
        "unreadable": "cannot be read",
    }
    detail = f" ({fault.detail})" if fault.detail else ""
    return f"{', '.join(fault.stages)}: {fault.path}: {words[fault.fault]}{detail}"


def text(done: Repair) -> str:
    """What was found and done, and the command to type next."""
    read = f"{done.stages} finished stages, {done.files} files, {size(done.bytes)} read"
    if not done.stages and not done.run_again:
        lines = [f"{done.run_dir}: no finished stage to check."]
    elif not done.damaged:
        lines = [f"Nothing is damaged: {read}."]
    else:
        number = len(done.damaged)
        lines = [f"Damaged: {number} file{'s' if number > 1 else ''}; checked: {read}."]
        lines += [f"  {_line(fault)}" for fault in done.damaged[:_SHOWN]]
        if len(done.damaged) > _SHOWN:
            lines.append(f"  and {len(done.damaged) - _SHOWN} more; --json names them all")
    if done.set_aside:
        rows = [[", ".join(a.stages), _OUTCOMES[a.outcome], str(a.to)] for a in done.set_aside]
        lines += ["", table(["stage", "set aside", "as (delete it when you like)"], rows)]
    lines += [f"Not checked, as a process is working on it: {name}" for name in done.skipped]
    if done.run_again or done.damaged:
        lines += ["", *_next(done)]
    return "\n".join(lines)


def _next(done: Repair) -> Iterator[str]:
    """What the run lacks, and the command to type."""
    again = ", ".join(done.run_again)
    own = "" if done.own_config else " (with the -c and --set given here)"
    if again:
        yield f"To be made again: {again}; what follows is kept if the same files come out."
    if done.dry_run and done.damaged:
        run = shlex.quote(str(done.run_dir))
        yield f"Nothing was changed. To set damaged folders aside: scmini repair -o {run}{own}"
    elif again:
        yield f"To do so: {done.command}{own}"


def document(done: Repair) -> dict[str, Any]:
    """One JSON document."""
    found = json.loads(json.dumps(asdict(done), default=str))
    command = done.command if done.run_again and not (done.dry_run and done.damaged) else None
    return {"sound": not done.damaged and not done.run_again, **found, "command": command}
