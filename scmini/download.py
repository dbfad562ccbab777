"""`scmini download`: everything from the Hugging Face hub that a run will read, beforehand.

Files go into the hub's own cache (HF_HOME), where every later stage finds them without a network:
a broken download goes on where it was, every file is compared with the hub's checksum, and a file
that was found right once is not read again.
"""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scmini.config import Config
from scmini.console import size, table
from scmini.data.hub.cache import HubRepo, Record, fetched, read_record, write_record
from scmini.data.hub.files import BODY, ENCODER, MODEL, REWARD_MODEL, fetch, quiet_hub
from scmini.data.hub.rows import DATA_SET_SPLITS, default_split, parts
from scmini.data.hub.wanted import Item, Wanted, look_for
from scmini.display import Display
from scmini.errors import DataError, EnvironmentProblem, Interrupted, ServiceError
from scmini.evaluation.benchmarks import lm_eval_data
from scmini.locks import locked
from scmini.stage_graph import tasks
from scmini.store import disk_full_is_said

RESERVE = 1 << 30
"""Bytes of the disk that a download leaves free."""
OFFLINE = {"HF_HUB_OFFLINE": "1"}
_TELL_SECONDS = 0.2


@dataclass
class Download:
    """What a configuration needs of the hub, and where it is."""

    items: list[Item]
    cache: Path
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise what stands in the way of one or more of them, all in one message.

        Raises:
            EnvironmentProblem: names, terms, access; DataError: no usable weights, no such split.
            ServiceError: the hub cannot be reached, and nothing else is wrong.
        """
        problems = [item.problem for item in self.items if item.problem is not None]
        if not problems:
            return
        kinds = [type(problem) for problem in problems]
        kind = next((k for k in (EnvironmentProblem, DataError) if k in kinds), ServiceError)
        raise kind("\n".join(dict.fromkeys(map(str, problems))))


def needed(config: Config) -> list[Wanted]:
    """Everything that the stages of a configuration read by the name of a model or data set.

    Names of folders on this machine are listed as well (`Wanted.is_local`).

    Raises:
        DataError: a name that can only be a folder, and is none.
    """
    stages = {task.stage for task in tasks(config)}
    model, reward = config.model, config.reward
    named = [("model.model_name_or_path", model.model_name_or_path, model.revision, MODEL)]
    if "embed" in stages and config.embed.encoder != "hashed-ngrams":
        named.append(("embed.encoder", config.embed.encoder, None, ENCODER))
    if config.grader == "model":
        name = reward.model_name_or_path
        named.append(("reward.model_name_or_path", name, reward.revision, REWARD_MODEL))
        named.append(("reward.body_name_or_path", reward.body_name_or_path, None, BODY))
    found = [
        Wanted(key, HubRepo("model", name, revision), use)
        for key, name, revision, use in named
        if name is not None
    ]
    found += _data_sets(config)
    for wanted in found:
        if wanted.repo.name.startswith((".", "/", "~")) and not wanted.is_local:
            raise DataError(f"{wanted.key}: {wanted.repo.name} does not exist")
    return found


def _data_sets(config: Config) -> Iterator[Wanted]:
    data = config.data
    if data.dataset_name is not None:
        first = data.dataset_split or default_split(data.format)
        splits = dict.fromkeys((first, data.dataset_test_split or first))
        yield Wanted(
            "data.dataset_name",
            HubRepo("dataset", data.dataset_name, data.revision),
            splits=tuple((part, split) for split in splits for part in parts(data)),
            folders=data.format == "hh-rlhf",
        )
    for task in config.benchmark.tasks:
        key = f"{task.replace('-', '_')}_questions"
        if key in DATA_SET_SPLITS:
            repo = HubRepo("dataset", getattr(config.benchmark, key))
            yield Wanted(f"benchmark.{key}", repo, splits=(DATA_SET_SPLITS[key],))


def not_fetched(config: Config) -> list[str]:
    """Names on the hub of which `download` has not fetched all that is needed; asks no hub."""
    asked = [wanted for wanted in needed(config) if not wanted.is_local]
    return [w.repo.name for w in asked if any(fetched(w.repo, use) is None for use in w.uses)]


def look(config: Config) -> Download:
    """Compare what a configuration needs with what is here; asks the hub, and fetches nothing.

    Where the hub does not answer, what was fetched before counts as it is.
    """
    from huggingface_hub import constants

    items: list[Item] = []
    for wanted in needed(config):
        silence = next((item.silence for item in items if item.silence), None)
        items.append(look_for(wanted, silence))
    made = Download(items, Path(constants.HF_HUB_CACHE))
    if "lm-eval" in config.benchmark.tasks:
        made.notes.append(_of_lm_eval(config))
    return made


def _of_lm_eval(config: Config) -> str:
    if lm_eval_data.is_fetched(config.benchmark):
        state = "here"
    elif lm_eval_data.is_installed():
        state = "not here yet (its loader does not tell sizes)"
    else:
        state = "not here: pip install 'scmini[eval]', whose loader fetches it, and come back"
    return f"the data of lm-evaluation-harness's tasks is {state}"


def download(config: Config, *, dry_run: bool = False) -> Download:
    """Have everything that a configuration needs of the hub on this machine, checked.

    Args:
        dry_run: look only.

    Raises:
        EnvironmentProblem, DataError: see `Download.check`; or the disk is too small; before
            anything is fetched. StoreBusy: another process fetches the same.
        ServiceError, Interrupted: what was fetched is kept, and the next call goes on.
    """
    made = look(config)
    if dry_run:
        return made
    made.check()
    todo = [item for item in made.items if item.listing is not None]
    _check_disk(todo, made.cache)
    try:
        with quiet_hub(), Display() as display, disk_full_is_said(made.cache):
            for item in todo:
                _fetch_item(item, display)
            if "lm-eval" in config.benchmark.tasks:
                _fetch_lm_eval(config, display)
                made.notes = [_of_lm_eval(config)]
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; what was fetched is kept, and the same command goes on"
        ) from None
    return made


def _check_disk(items: list[Item], cache: Path) -> None:
    missing: dict[Path, int] = {}
    for item in items:
        assert item.listing is not None
        for path in item.files:
            left = item.listing.files[path].bytes - item.listing.here(path)
            missing[item.listing.blob(path)] = left
    place = next(p for p in (cache, *cache.absolute().parents) if p.is_dir())
    free, left = shutil.disk_usage(place).free, sum(missing.values())
    if left and left + RESERVE > free:
        raise EnvironmentProblem(
            f"{cache}: {size(left)} are still to come, and the disk has {size(free)} free "
            f"({size(RESERVE)} of it stay free); make room, or let HF_HOME name a folder on a "
            "larger disk"
        )


def _fetch_item(item: Item, display: Display) -> None:
    """Fetch and check the files of an item, and put down what was found right."""
    listing, repo = item.listing, item.wanted.repo
    assert listing is not None
    begun = read_record(repo, listing.commit)
    record = Record({**begun.uses, **item.uses}, dict(begun.seals))
    lock = repo.folder / "scmini" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, f"{repo.name} is being fetched by another process"):
        item.measure()
        meter = None if item.state == "present" else _Meter(repo.name, item, display)
        for path in item.files:
            seal = record.seals.get(path)
            tell = meter.more if meter else (lambda _count: None)
            if (now := fetch(listing, path, seal, tell)) != seal:
                record.seals[path] = now
                write_record(repo, listing.commit, record)
        if record != begun:
            write_record(repo, listing.commit, record)
        # A list of all there is, by which the hub's library would miss what nobody needs.
        (repo.folder / "trees" / f"{listing.commit}.json").unlink(missing_ok=True)
        if repo.ref is not None and repo.commit != listing.commit:
            repo.ref.parent.mkdir(parents=True, exist_ok=True)
            repo.ref.write_text(listing.commit, encoding="ascii")
        if meter:
            display.finish(repo.name, f"{len(item.files)} files, {size(item.bytes)}, checked")
    item.measure()


def _fetch_lm_eval(config: Config, display: Display) -> None:
    if lm_eval_data.is_installed() and not lm_eval_data.is_fetched(config.benchmark):
        display.start("lm-eval")
        lm_eval_data.fetch(config.benchmark)
        display.finish("lm-eval", "data of its tasks fetched")


class _Meter:
    """Shows how much of an item is here."""

    def __init__(self, label: str, item: Item, display: Display) -> None:
        self._label, self._display = label, display
        self._done, self._total = item.bytes_here, item.bytes
        self._told = time.monotonic()
        display.start(label)

    def more(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told < _TELL_SECONDS:
            return
        self._told = now
        done, total = self._done >> 20, (self._total >> 20) + 1
        event = {"done": min(done, total - 1), "total": total, "unit": "MiB", "figures": {}}
        self._display.progress(self._label, event)


def offline_environment(config: Config, stage: str) -> dict[str, str]:
    """Variables with which a stage's process asks no hub: those of `OFFLINE` if all is here.

    Without them every library asks the hub first, and where there is no network it asks for each
    optional file again and again, up to half a minute long. Reads records only.
    """
    harness = stage == "benchmark" and "lm-eval" in config.benchmark.tasks
    if "HF_HUB_OFFLINE" in os.environ or (
        harness and not lm_eval_data.is_fetched(config.benchmark)
    ):
        return {}
    from_hub = any(not wanted.is_local for wanted in needed(config))
    return dict(OFFLINE) if from_hub and not not_fetched(config) else {}


def text(made: Download) -> str:
    """A table for people, with the sum and what else is to be known."""
    if not made.items:
        return "nothing to download: this configuration names no model and no data set"
    rows = [
        [
            item.wanted.key,
            item.wanted.repo.name,
            (item.commit or "")[:10],
            str(len(item.files)) if item.files else "",
            size(item.bytes) if item.bytes else "",
            item.state if item.state != "partial" else f"{item.state} ({size(item.bytes_here)})",
            item.listing.licence if item.listing else "",
        ]
        for item in made.items
    ]
    head = ["key", "name", "commit", "files", "size", "state", "licence"]
    total, here = (sum(vars(item)[key] for item in made.items) for key in ("bytes", "bytes_here"))
    lines = [table(head, rows), f"{size(total)} in all, {size(here)} of it here: {made.cache}"]
    if any(item.silence and item.state == "present" for item in made.items):
        lines.append("the hub did not answer: `present` is what was fetched before")
    return "\n".join(lines + made.notes)


def document(made: Download) -> dict[str, Any]:
    """The same for programs."""
    return {
        "cache": str(made.cache),
        "items": [
            {
                "key": item.wanted.key,
                "name": item.wanted.repo.name,
                "revision": item.wanted.repo.revision,
                "commit": item.commit if item.state != "local" else None,
                "state": item.state,
                "problem": str(item.problem) if item.problem else None,
                "files": len(item.files),
                "bytes": item.bytes,
                "bytes_here": item.bytes_here,
                "licence": item.listing.licence if item.listing else "",
                "path": str(item.path) if item.path else None,
            }
            for item in made.items
        ],
        "notes": made.notes,
    }
