"""Finished stages live in folders named by their recipe. A folder that exists is complete.

    .store/dpo-self-contrast-4-3fa9c1d20b77/           finished: products and manifest.json
    .store/.dpo-self-contrast-4-3fa9c1d20b77.partial/  being built, or left by a crash: continued
                                               (log/forced in it: begun anew by --force)
    .store/.dpo-self-contrast-4-3fa9c1d20b77.lock      held (flock) by the process that builds it
    .store/.dpo-self-contrast-4-3fa9c1d20b77.old/      replaced by --force, about to be deleted
    .store/dpo-self-contrast-4-3fa9c1d20b77.damaged-1/ what of it `scmini repair` set aside

The manifest is written last and the folder renamed once, so a kill at any instant leaves either a
finished folder or one to continue.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from scmini import partial as work_folder
from scmini.durable import disk_full_is_said as disk_full_is_said
from scmini.durable import sha256_of as sha256_of
from scmini.durable import sync
from scmini.durable import write_atomic as write_atomic
from scmini.errors import StoreBusy, StoreDamaged
from scmini.locks import is_locked, locked
from scmini.partial import MANIFEST as MANIFEST
from scmini.partial import sealing as sealing

VOLATILE = ("log/*", "metrics.jsonl", "trainer_state.json", "checkpoint-*/*")
"""Files that hold times: sealed, but not part of what downstream stages depend on."""
PACKAGES = (
    *("scmini", "torch", "transformers", "peft", "bitsandbytes", "sentence-transformers"),
    *("faiss-cpu", "numpy", "pyarrow", "tokenizers"),
)
_REMEDY = "scmini repair sets it aside and keeps the rest"


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """Everything that can change a stage's result."""

    stage: str
    method: str | None
    version: int
    """Raised by hand when the meaning of the stage changes."""
    config: dict[str, Any]
    """The settings it reads."""
    sources: dict[str, str] = field(default_factory=dict)
    """Digests or revisions of files that no stage made: data files, downloaded models."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Upstream stage -> digest of those of its files that are read."""

    @property
    def digest(self) -> str:
        return digest(asdict(self))

    @property
    def folder(self) -> str:
        return f"{self._stem}-{self.digest[:12]}"

    @property
    def _stem(self) -> str:
        return f"{self.stage}-{self.method}" if self.method else self.stage


@dataclass(frozen=True)
class Finished:
    """A finished stage."""

    path: Path
    manifest: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return Recipe(**self.manifest["recipe"])

    @property
    def seconds(self) -> float:
        return float(self.manifest["seconds"])

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(int(seal["bytes"]) for seal in self.manifest["files"].values())


@dataclass
class Work:
    """What a stage gets to work in; see the table of stages in `scmini.stage_graph`."""

    path: Path
    method: str | None = None
    earlier: list[Path] = field(default_factory=list)
    """Finished folders of this stage and method whose recipe differs in the pairs chosen alone.

    Those that are damaged are left out, and all of them under --force."""
    counts: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Any] = field(default_factory=dict)

    def count(self, reason: str, number: int = 1) -> None:
        """Add to a count of the manifest: rows dropped, texts cut off and so on."""
        self.counts[reason] += number

    def note(self, key: str, value: Any) -> None:
        """Put a JSON value into the manifest."""
        self.notes[key] = value


class Store:
    """The folder of finished stages. Made on first use."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def find(self, recipe: Recipe) -> Finished | None:
        """The finished stage of this recipe, if there is one."""
        return self.load(recipe.folder)

    def load(self, folder: str) -> Finished | None:
        """A finished stage by the name of its folder."""
        path = self.root / folder
        try:
            found = Finished(path, json.loads((path / MANIFEST).read_bytes()))
            _ = found.recipe, found.seconds, found.size, digest_of(found.manifest)
            return found
        except (FileNotFoundError, NotADirectoryError):
            if path.exists():
                raise StoreDamaged(f"{path / MANIFEST}: missing; {_REMEDY}") from None
            return None
        except OSError as error:
            raise StoreDamaged(
                f"{path / MANIFEST}: cannot be read ({error.strerror}); {_REMEDY}"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise StoreDamaged(f"{path / MANIFEST}: damaged; {_REMEDY}") from None

    def partial(self, recipe: Recipe) -> Path:
        """Where the stage works until it is finished."""
        return self.partial_of(recipe.folder)

    def partial_of(self, folder: str) -> Path:
        """Where the stage of this folder works."""
        return self.root / f".{folder}{work_folder.SUFFIX}"

    def is_building(self, recipe: Recipe) -> bool:
        """Whether some process is building it now."""
        return is_locked(self.lock(recipe.folder))

    @contextmanager
    def building(self, recipe: Recipe, *, force: bool = False) -> Iterator[Work | None]:
        """Yield the work folder, kept across crashes, and finish it when the block ends well.

        Yields None when the stage is already finished, unless `force`: then the finished folder
        stays until its replacement is complete. Beside a finished folder, `force` goes on only with
        work that an earlier `force` began; what was begun without it is deleted.

        Raises:
            StoreBusy: another process is building it.
            EnvironmentProblem: the disk is full.
        """
        final, partial = self.root / recipe.folder, self.partial(recipe)
        old, busy = self.replaced(final.name), f"{final.name} is being built by another process"
        with disk_full_is_said(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self.lock(final.name), busy):
                if old.exists() and not final.exists():
                    os.rename(old, final)  # a kill between the two renames below
                if final.exists() and not force:
                    yield None
                    return
                work = Work(partial, recipe.method, [] if force else self._earlier(recipe))
                work_folder.reopen(partial, anew=force, finished=final.exists())
                yield work
                _seal(work, recipe)
                if final.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    os.rename(final, old)
                os.rename(partial, final)
                sync(self.root)
                shutil.rmtree(old, ignore_errors=True)

    def tidy(self, finished: Finished) -> None:
        """Remove what a kill right after the last rename left beside a finished stage."""
        lock, old = self.lock(finished.path.name), self.replaced(finished.path.name)
        if lock.exists() or old.exists():
            with suppress(StoreBusy), locked(lock, finished.path.name):
                shutil.rmtree(old, ignore_errors=True)

    def verify(self, finished: Finished, patterns: Sequence[str] = ("*",)) -> None:
        """Read the files again; `StoreDamaged` names the first that is not as it was written."""
        for name, seal in finished.manifest["files"].items():
            if not _matches(name, patterns):
                continue
            path = finished.path / name
            if not path.is_file():
                raise StoreDamaged(f"{path}: missing; {_REMEDY}")
            if path.stat().st_size != seal["bytes"] or sha256_of(path) != seal["sha256"]:
                raise StoreDamaged(f"{path}: changed after it was written; {_REMEDY}")

    def relatives(self, recipe: Recipe, ignoring: Collection[str] = ("filter",)) -> list[Finished]:
        """Finished stages whose recipe differs in nothing but the inputs `ignoring`."""

        def essence(r: Recipe) -> Recipe:
            return replace(r, inputs={k: v for k, v in r.inputs.items() if k not in ignoring})

        found = []
        for path in sorted(self.root.glob(f"{recipe._stem}-*")):
            with suppress(StoreDamaged):
                other = self.load(path.name)
                usable = other is not None and recipe.folder != path.name == other.recipe.folder
                if usable and other and essence(other.recipe) == essence(recipe):
                    found.append(other)
        return found

    def _earlier(self, recipe: Recipe) -> list[Path]:
        """Folders of the relatives whose files are as they were written."""
        intact = []
        for found in self.relatives(recipe):
            with suppress(StoreDamaged, OSError):
                self.verify(found)
                intact.append(found.path)
        return intact

    def lock(self, folder: str) -> Path:
        """Held by whoever builds, replaces or sets aside this folder."""
        return self.root / f".{folder}.lock"

    def replaced(self, folder: str) -> Path:
        """What --force replaced, for the moment before it is deleted."""
        return self.root / f".{folder}.old"


def digest_of(manifest: Mapping[str, Any], patterns: Sequence[str] = ("*",)) -> str:
    """Digest of the products that match: what a stage that reads only these depends on."""
    seals = {
        name: seal["sha256"]
        for name, seal in manifest["files"].items()
        if _matches(name, patterns) and not _matches(name, VOLATILE)
    }
    return digest(seals)


def explain(old: Recipe, new: Recipe) -> list[str]:
    """How two recipes of a stage differ, one line for each field."""
    lines = []
    if old.version != new.version:
        lines.append(f"version of the stage: {old.version} -> {new.version}")
    before, after = dict(_flat(old.config)), dict(_flat(new.config))
    for name in dict.fromkeys([*before, *after]):
        left, right = (
            json.dumps(side[name]) if name in side else "unset" for side in (before, after)
        )
        if left != right:
            lines.append(f"{name}: {left} -> {right}")
    for name in dict.fromkeys([*old.sources, *new.sources]):
        if old.sources.get(name) != new.sources.get(name):
            lines.append(f"{name} changed")
    for name in dict.fromkeys([*old.inputs, *new.inputs]):
        if old.inputs.get(name) != new.inputs.get(name):
            lines.append(f"input {name} changed")
    return lines


def _seal(work: Work, recipe: Recipe) -> None:
    shutil.rmtree(work.path / "scratch", ignore_errors=True)
    *before, last = work_folder.sessions(work.path)
    seconds = sum(end - start for start, end in before) + time.time() - last[0]
    noted, files = work_folder.noted(work.path), {}
    for path in work_folder.products(work.path):
        name = path.relative_to(work.path).as_posix()
        if path.is_file():
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            if noted.get(name, files[name]) != files[name]:
                raise StoreDamaged(
                    f"{path}: changed after it was written; run again, and it is made anew"
                )
    manifest = {
        "recipe": asdict(recipe),
        "digest": recipe.digest,
        "products": digest_of({"files": files}),
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "counts": dict(work.counts),
        "notes": work.notes,
        "versions": versions(),
        "files": files,
    }
    write_atomic(work.path / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
    for name in work_folder.PASSING:  # last: sealing may fail and be tried again
        (work.path / name).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of Python and of the main packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict):
            yield from _flat(inner, f"{name}.")
        else:
            yield name, inner
