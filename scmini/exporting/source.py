"""What an export starts from: a trained method of a run, with the settings it was trained with.

All of it comes from the manifests of finished stages, never from config.yaml, which may have been
changed since.
"""

import difflib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scmini.config_file import load_config
from scmini.console import warn
from scmini.errors import StoreDamaged, UsageError
from scmini.outside import folder_digest
from scmini.pipeline import store_root
from scmini.quoting import plain
from scmini.sections import ModelConfig
from scmini.stage_graph import trained_by
from scmini.store import MANIFEST, Finished, Store, digest_of

_NAME = "model.model_name_or_path"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_REMEDY = "scmini repair sets the stage aside, and scmini run all makes it anew"


@dataclass(frozen=True)
class Trained:
    """A trained method."""

    run: Path
    name: str
    """Of the run."""
    asked: str
    """The method that was named; `sft-temperature-T` has the weights of `sft`."""
    method: str
    finished: Finished
    model: ModelConfig
    made_base: Path | None
    """The base model, where the stage `base` made it or added tokens to it."""

    @property
    def adapter(self) -> Path:
        return self.finished.path / "adapter"

    @property
    def source(self) -> str:
        """Folder or hub name of the base model."""
        return str(self.made_base or self.model.model_name_or_path)

    @property
    def base_on_hub(self) -> str | None:
        """The base model's name on the hub, if it was named by that; tokens may have been added."""
        name = self.model.model_name_or_path
        return name if on_hub(name, self.finished.recipe.sources.get(_NAME)) else None

    @property
    def settings(self) -> dict[str, Any]:
        """Sections of the configuration with which the adapter was trained, as in its recipe."""
        return self.finished.recipe.config

    @cached_property
    def lora(self) -> dict[str, Any]:
        """The adapter's own configuration."""
        path = self.adapter / "adapter_config.json"
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return settings

    def upstream(self, folder: Path, key: str, patterns: tuple[str, ...]) -> dict[str, Any] | None:
        """Manifest of a finished stage, if this adapter was made from its files.

        Args:
            folder: of the stage.
            key: under which the adapter's recipe has its digest.
            patterns: files that count.
        """
        manifest = read_manifest(folder)
        if manifest is None or self.finished.recipe.inputs.get(key) is None:
            return None
        same = digest_of(manifest, patterns) == self.finished.recipe.inputs[key]
        return manifest if same else None

    def pairs(self) -> Path | None:
        """The pairs of the run, if they are those that the adapter was trained on."""
        name = f"pairs/{self.method}.jsonl"
        path = self.run / name
        if "filter" not in self.finished.recipe.inputs or not path.is_file():
            return None
        folder = path.resolve().parent.parent
        return path if self.upstream(folder, "filter", (name,)) else None

    def report(self) -> dict[str, Any] | None:
        """results.json of the run, if these very weights were judged in it."""
        manifest = read_manifest(self.run / "report")
        weights = digest_of(self.finished.manifest, ("adapter/*",))
        if manifest is None or manifest["recipe"]["inputs"].get(f"train:{self.asked}") != weights:
            return None
        path = self.run / "report" / "results.json"
        try:
            results: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise StoreDamaged(f"{path}: {plain(error)}; {_REMEDY}") from None
        return results


def on_hub(name: str | None, source: str | None) -> bool:
    """Whether a name in a configuration is one on the hub.

    Args:
        source: what the recipe wrote down of it: for a folder, a digest of its files.
    """
    if name is None or not _HUB.fullmatch(name) or Path(name).is_dir():
        return False
    return source is None or source.startswith(f"{name}@")


def find(run: Path, method: str) -> Trained:
    """A method that is trained, intact as it was written.

    Raises:
        UsageError: no such run or method, or it is not trained yet; names the command.
        StoreDamaged: files were changed since.
    """
    check_run(run)
    config = load_config(str(run / "config.yaml"))
    there = sorted(path.name for path in (run / "models").glob("[!.]*"))
    known = list(dict.fromkeys([*config.methods, "sft", *there]))
    if method not in known:
        near = difflib.get_close_matches(method, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        raise UsageError(f"{run} has no method {method!r}; {hint}")
    task = trained_by(method)
    weights = task.method or "sft"
    folder = (run / "models" / weights).resolve()
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(
            f"{run}: {weights} is not trained yet; this does it: "
            f"scmini run all --until {task.stage} -o {shlex.quote(str(run))}"
        )
    found = Finished(folder, manifest)
    store = Store(store_root(run))
    store.verify(found, ("adapter/*",))
    try:
        model = ModelConfig.model_validate(found.recipe.config["model"])
    except (KeyError, TypeError, ValueError):
        raise StoreDamaged(
            f"{folder / MANIFEST}: of another version of scmini; run again"
        ) from None
    base = _made_base(run, store, found)
    _check_unchanged(found, model)
    return Trained(run, config.name, method, weights, found, model, base)


def check_run(run: Path) -> None:
    """UsageError if a folder is no run."""
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run}: no such run folder; -o names one")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage; None where it is not finished."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        found = Finished(folder, manifest)
        _ = found.recipe, found.seconds, found.size, digest_of(manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreDamaged(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreDamaged(f"{path}: damaged; {_REMEDY}") from None
    return manifest


def _made_base(run: Path, store: Store, found: Finished) -> Path | None:
    """The model that the stage `base` made for this adapter."""
    wanted = found.recipe.inputs.get("base")
    if wanted is None:
        return None
    for folder in _base_folders(run, store):
        manifest = read_manifest(folder)
        if manifest is not None and digest_of(manifest, ("model/*",)) == wanted:
            store.verify(Finished(folder, manifest), ("model/*",))
            return folder / "model"
    raise UsageError(
        f"{found.path}: its base model is not in {store.root} any more; run again: "
        f"scmini run all -o {shlex.quote(str(run))}"
    )


def _base_folders(run: Path, store: Store) -> Iterator[Path]:
    yield (run / "base").resolve()
    finished = f"base-{'[0-9a-f]' * 12}"  # not those that `scmini repair` has set aside
    yield from sorted(store.root.glob(finished))


def _check_unchanged(found: Finished, model: ModelConfig) -> None:
    """A base model in a local folder should be what it was."""
    name = model.model_name_or_path
    before = found.recipe.sources.get(_NAME)
    if name and before and Path(name).is_dir() and folder_digest(Path(name)) != before:
        warn(f"{_NAME}: {name} changed since the adapter was trained on it")
