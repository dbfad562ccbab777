"""A run that is killed, starved and damaged ends like one that is not."""

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest
from fault_campaign import (
    FAILED,
    FINISHED,
    FORCE,
    FULL,
    LIMIT,
    QUICK,
    RECORD,
    SECOND,
    SIGNAL,
    WORK,
    Campaign,
    Step,
    Tally,
    steps_of,
)
from fault_disk import Disk
from fault_runs import LONG, SHORT, TinyRun

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the harness reads /proc")
SEED = os.environ.get("SCMINI_FAULTS_SEED", "1")
NAMES = Path(__file__).parent / "steps.txt"
"""Every step at which a run changes files."""
CAMPAIGNS = 4
KILLED_IN_SHORT = (
    "run rename run/.run.json.tmp -> run/run.json",
    "run rename run/.link.tmp -> run/link",
    "run remove run/.job.json",
    "stage open work/log/.sessions.json.tmp",
    "stage rename work/pairs/.METHOD.jsonl.tmp -> work/pairs/METHOD.jsonl",
    "stage rename work/.manifest.json.tmp -> work/manifest.json",
    "stage remove work/log/sessions.json",
    "stage rename work -> final",
    "stage fsync store",
    "stage rename work/.checkpoint-N.tmp -> work/checkpoint-N",
    "stage rename work/.part-N.npy.tmp -> work/part-N.npy",
)
OTHERS_IN_SHORT = [
    *(SIGNAL, SIGNAL, FAILED, FAILED, LIMIT, FULL, WORK, FINISHED, FINISHED, RECORD, SECOND),
    *(SECOND, FORCE),
]
OTHERS_IN_LONG = [
    *[SIGNAL, FAILED] * 6,
    *[WORK, FINISHED] * 3,
    *[LIMIT, FULL, SECOND, RECORD, FORCE] * 2,
    RECORD,
]


def undisturbed(disk: Disk, methods: tuple[str, ...], name: str) -> TinyRun:
    run = TinyRun(disk.path / "now", methods)
    ended = run.do("run", "all")
    assert ended.code == 0, ended.output
    return run.moved(disk.path / f"whole-{name}")


def by_name(run: TinyRun) -> dict[str, list[Step]]:
    """The steps of a run; fails if one disappeared or is new: then see that it is safe."""
    found: dict[str, list[Step]] = {}
    for step in steps_of(run):
        found.setdefault(f"{step.role} {step.name}", []).append(step)
    known = set(NAMES.read_text().splitlines())
    gone, new = sorted(known - found.keys()), sorted(found.keys() - known)
    assert not gone, f"steps that did not happen; take them out of {NAMES.name}: {gone}"
    assert not new, f"new steps; put them into {NAMES.name}: {new}"
    return found


def one_of(steps: list[Step], luck: random.Random) -> Step:
    """One that costs little, if there is one: most of the time goes into importing torch."""
    quick = [step for step in steps if step.task.partition("-")[0] in QUICK]
    return luck.choice(quick or steps)


def campaign(
    disk: Disk, whole: TinyRun, name: str, tally: Tally, kinds: list[str], must: list[Step]
) -> None:
    work = Campaign(disk.path / "now", whole, f"{SEED} {name}", tally, disk, quick=name == "short")
    try:
        work.go(kinds, must)
    finally:
        work.run.root.rename(disk.path / name)


@pytest.mark.parametrize(
    ("path", "task", "name"),
    [
        (".store/.sft-sft-continued-0123456789ab.partial", "sft-sft-continued", "work"),
        (".store/.sft-0123456789ab.partial/checkpoint-12/a/b.json", "sft", "work/checkpoint-N/*"),
        (".store/.sft-0123456789ab.partial/.adapter.tmp/a", "sft", "work/.adapter.tmp/*"),
        (".store/.sample-0123456789ab.partial/.part-00003.parquet.tmp", "sample",
         "work/.part-N.parquet.tmp"),
        (".store/filter-0123456789ab/pairs/self-contrast-1.jsonl", "filter",
         "final/pairs/METHOD.jsonl"),
        (".store/.report-0123456789ab.partial/figures/.win_rate.svg.tmp", "report",
         "work/.page.tmp"),
        (".store/.dpo-spin-2-0123456789ab.old/x", "dpo-spin-2", "replaced/x"),
        (".store/.data-0123456789ab.lock", "data", "lock"),
        ("toy/models/.spin.tmp", "", "run/.link.tmp"),
        ("toy/.job-base.json", "", "run/.job.json"),
        ("toy/.run.json.tmp", "", "run/.run.json.tmp"),
        (".store", "", "store"),
    ],
)  # fmt: skip
def test_names_of_steps(path: str, task: str, name: str) -> None:
    place = Path(__file__).parent / "shim" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("fault_shim", place)
    assert spec is not None
    assert spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    assert shim.named(path) == (task, name)


def test_short(disk: Disk, tally: Tally) -> None:
    whole = undisturbed(disk, SHORT, "short")
    steps = by_name(whole)
    luck = random.Random(SEED)
    before = tally.tried.total()
    must = [one_of(steps[name], luck) for name in KILLED_IN_SHORT]
    campaign(disk, whole, "short", tally, OTHERS_IN_SHORT, must)
    assert tally.tried.total() - before >= 20


@pytest.fixture(scope="module")
def whole(disk: Disk) -> TinyRun:
    return undisturbed(disk, LONG, "long")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(CAMPAIGNS), ids=lambda number: f"long{number}")
def test_long(disk: Disk, whole: TinyRun, tally: Tally, number: int) -> None:
    steps = by_name(whole)
    names = random.Random(SEED).sample(sorted(steps), len(steps))[number::CAMPAIGNS]
    luck = random.Random(f"{SEED} {number}")
    must = [one_of(steps[name], luck) for name in names]
    campaign(disk, whole, f"long{number}", tally, OTHERS_IN_LONG, must)


@pytest.mark.slow
def test_so_many_were_tried(tally: Tally) -> None:
    """After all of `test_long`."""
    assert tally.survived.total() == tally.tried.total() >= 200
