"""The run folder, which people open: the configuration, run.json, and links into the store."""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from scmini.config import Config
from scmini.config_file import config_to_yaml
from scmini.errors import EnvironmentProblem
from scmini.stage_graph import Task
from scmini.store import Finished, write_atomic

_FOLDERS = {
    "data": {"data": "."},
    "base": {"base": "."},
    "sft": {"sft": ".", "models/sft": "."},
    "sample": {"samples": "."},
    "embed": {"embeddings": "."},
    "filter": {"similarity": "similarity", "pairs": "pairs"},
    "reference": {"reference": "."},
    "report": {"report": "."},
}
_BY_METHOD = {
    "sft": {"models/{method}": "."},
    "dpo": {"models/{method}": "."},
    "generate": {"generations/{method}.jsonl": "generations.jsonl"},
    "reward": {"rewards/{method}.jsonl": "rewards.jsonl"},
    "benchmark": {"benchmarks/{method}": "."},
    "judge": {"judgments/{method}": "."},
    "sample": {"rounds/{method}/samples": "."},
    "filter": {"rounds/{method}/pairs": "pairs"},
    "reference": {"rounds/{method}/reference": "."},
}
"""The last three: later rounds of SPIN."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)


def links(task: Task) -> dict[str, str]:
    """Names in the run folder -> what they point to inside the task's finished folder."""
    if task.method is None:
        return _FOLDERS[task.stage]
    return {
        name.replace("{method}", task.method): to for name, to in _BY_METHOD[task.stage].items()
    }


class RunFolder:
    """One run folder. `record` is the content of its run.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {"name": path.name, "stages": {}}
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found = json.loads((path / "run.json").read_bytes())
            entries = {k: v for k, v in found["stages"].items() if isinstance(v, dict)}
            self.record = {**found, "stages": entries}

    def begin(self, config: Config, tasks: list[Task]) -> None:
        """Write the configuration, and drop the links of tasks that are no longer part of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        for job in self.path.glob(".job-*.json"):
            job.unlink()  # of a run that was killed
        write_atomic(self.path / "config.yaml", config_to_yaml(config).encode())
        current = {task.key for task in tasks}
        for key in [key for key in self.record["stages"] if key not in current]:
            stage, _, method = key.partition(":")
            if stage not in (_BY_METHOD if method else _FOLDERS):
                continue  # of another version of scmini, which knows its links
            for name in links(Task(stage, method or None)):
                _unlink(self.path / name)
            del self.record["stages"][key]
        self._save()

    def finish(self, task: Task, found: Finished) -> None:
        """Link a finished task and put it down in run.json, unless nothing changed."""
        for name, to in links(task).items():
            _link(self.path / name, found.path / to)
        entry = {"folder": found.path.name}
        if self.record["stages"].get(task.key) != entry:
            self.record["stages"][task.key] = entry
            self._save()

    def fail(self, task: Task, digest: str, message: str) -> None:
        """Put down that a task failed, for `status`."""
        entry = self.record["stages"].setdefault(task.key, {})
        entry["failed"] = {"digest": digest, "message": message}
        self._save()

    def unlink(self, task: Task, folder: Path) -> None:
        """Take away the task's links into a folder of the store; those into others stay."""
        for name, to in links(task).items():
            if _points(self.path / name) == _target_text(self.path / name, folder / to):
                _unlink(self.path / name)

    def entry(self, task: Task) -> dict[str, Any]:
        """What run.json knows of a task: `folder` (the last finished one) and `failed`."""
        entry: dict[str, Any] = self.record["stages"].get(task.key, {})
        return entry

    @property
    def finished_stages(self) -> set[str]:
        """Stages that were finished here once, whatever the configuration was."""
        entries: dict[str, dict[str, Any]] = self.record["stages"]
        return {key.partition(":")[0] for key, entry in entries.items() if entry.get("folder")}

    def _save(self) -> None:
        write_atomic(self.path / "run.json", json.dumps(self.record, indent=1).encode())


def _link(link: Path, target: Path) -> None:
    """Point `link` at `target`, in one step; where links are not possible it becomes a copy."""
    link.parent.mkdir(parents=True, exist_ok=True)
    text = _target_text(link, target)
    if link.is_symlink() and os.readlink(link) == text:
        return
    marker = _marker(link)
    if link.exists() and not link.is_symlink():
        if not marker.exists():
            raise EnvironmentProblem(f"{link} is in the way; move it elsewhere")
        if marker.read_text(encoding="utf-8") == text:
            return
        _remove(link)
    torn = link.with_name(f".{link.name}.tmp")
    _remove(torn)
    try:
        os.symlink(text, torn)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _copy(target, torn)
        marker.write_text(text, encoding="utf-8")
    os.replace(torn, link)


def _target_text(link: Path, target: Path) -> str:
    return os.path.relpath(target.resolve(), link.parent.resolve())


def _points(link: Path) -> str | None:
    """What a link says, or would say if it had not become a copy."""
    with suppress(OSError):
        return os.readlink(link) if link.is_symlink() else _marker(link).read_text(encoding="utf-8")
    return None


def _copy(target: Path, to: Path) -> None:
    if target.is_dir():
        shutil.copytree(target, to)
    else:
        shutil.copy2(target, to)


def _marker(link: Path) -> Path:
    """Beside a copy that stands for a link: what the link would have said."""
    return link.with_name(f".{link.name}.copied")


def _unlink(link: Path) -> None:
    """Take away a link or the copy that stands for one; what others put there stays."""
    if link.is_symlink() or _marker(link).exists():
        _remove(link)
        _marker(link).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
