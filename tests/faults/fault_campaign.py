"""Faults drawn from a seed, one after another into the same run, and what each must end like.

A campaign starts a run, lets a fault end it, goes on from there with the next fault, and at last
without one. Then all it made must be what an undisturbed run made.
"""

import errno
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_disk import Disk
from fault_runs import Ended, Plan, TinyRun, leftovers, result, task_of

STEP, FAILED, LIMIT, FULL = "killed at a step", "failed write", "file limit", "full disk"
SIGNAL, WORK, FINISHED = "signal at an instant", "damage in a work folder", "damage, then repair"
SECOND, FORCE, RECORD = "second run", "killed during --force", "damaged run.json"
KINDS = (STEP, SIGNAL, FAILED, LIMIT, FULL, WORK, FINISHED, RECORD, SECOND, FORCE)
LATE = (SIGNAL, FINISHED, FAILED, LIMIT, FULL, SECOND)
"""After these a stage may be finished, so they come after the kills."""
WRITES = ("open ", "fsync ", "rename ", "mkdir ")
RESUMED = ("base", "sft", "sample", "embed", "dpo", "reference")
QUICK = ("", "data", "filter", "reward", "report")
FORCED = ("report", "filter", "data")
_PATIENCE = 120.0


@dataclass(frozen=True)
class Step:
    """A step of the undisturbed run; `place` orders the first times of all."""

    place: int
    role: str
    task: str
    name: str
    phase: str
    """The stage by which a person calls for it."""


@dataclass
class Tally:
    """What was tried; `missed`: the run had done its work before the fault came."""

    tried: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    steps: set[str] = field(default_factory=set)
    """Names of the steps at which something happened."""


def phase_of(task: str) -> str:
    stage, _, method = task.partition("-")
    return "dpo" if method and stage in ("sample", "filter", "reference") else stage


def steps_of(run: TinyRun) -> list[Step]:
    """The distinct steps of a run's log, each once for each task, in order."""
    found: dict[tuple[str, str, str], Step] = {}
    phase = "data"
    for place, line in enumerate(run.steps()):
        role, task, name = line.split("\t")
        phase = phase_of(task) if task else phase
        found.setdefault((role, task, name), Step(place, role, task, name, phase))
    return list(found.values())


def _turn(step: Step, kind: str) -> tuple[int, int]:
    """Of the faults of a phase: those first after which a stage is not finished."""
    if kind in LATE:
        return 1 + LATE.index(kind), step.place
    return int(not step.task), step.place


class Campaign:
    """Faults into one run.

    Args:
        root: an own folder.
        whole: the undisturbed run; its log says which steps there are.
        seed: decides everything but the duration of things; with the name of the test behind it.
        disk: the small disk on which `root` is, if it can be filled.
        quick: nearly all faults, not just most, hit stages that do not wait seconds for torch.
    """

    def __init__(
        self,
        root: Path,
        whole: TinyRun,
        seed: str,
        tally: Tally,
        disk: Disk,
        quick: bool = False,
    ) -> None:
        self.run = TinyRun(root, whole.methods)
        self.whole, self.seed, self.tally, self.disk = whole, seed, tally, disk
        self.random, self.quick = random.Random(seed), quick
        self.steps = steps_of(whole)
        self.first = {step.phase: step.place for step in reversed(self.steps)}
        self.done: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.spoilt: Counter[str] = Counter()
        self.trail: list[str] = []

    def go(self, kinds: list[str], must: list[Step]) -> None:
        """All faults in the order of the pipeline, then the end of the run and the comparison.

        Args:
            kinds: one for each fault.
            must: steps at which to kill besides.
        """
        drawn = [(self._draw(kind), kind) for kind in kinds if kind != FORCE]
        drawn += [(step, STEP) for step in must]
        while drawn:
            drawn.sort(key=lambda pair: (self.first[pair[0].phase], *_turn(*pair)), reverse=True)
            step, kind = drawn.pop()
            if not self._one(kind, step) and self._steps_for(kind, step.phase):
                drawn.append((self._draw(kind, step.phase), kind))  # then in a later stage
        for _ in range(kinds.count(FORCE)):
            self._one(FORCE, self.steps[0])
        ended = self.run.do("run", "all")
        self._check(ended.code == 0, "the run that goes on to the end", ended)
        self._compare()
        self.tally.survived += self.done

    def _draw(self, kind: str, after: str | None = None) -> Step:
        """The step at or near which a fault of this kind happens."""
        steps = self._steps_for(kind, after)
        if kind != WORK and (self.quick or self.random.random() < 0.6):
            quick = [step for step in steps if step.task.partition("-")[0] in QUICK]
            steps = quick or steps
        return self.random.choice(steps)

    def _steps_for(self, kind: str, after: str | None) -> list[Step]:
        """Where a fault of this kind may happen, in stages after one."""
        steps = [step for step in self.steps if step.role == "stage" and step.task]
        if kind == STEP:
            steps = self.steps
        if kind == FAILED:
            steps = [step for step in self.steps if step.name.startswith(WRITES)]
        if kind in (WORK, LIMIT):
            name = "open work/log/seals.jsonl" if kind == WORK else "open work/log/text.log"
            steps = [step for step in steps if step.name == name]
        if kind == SECOND:  # the lock is held by then
            steps = [step for step in steps if " work/" in step.name]
        start = -1 if after is None else self.first[after]
        return [step for step in steps if self.first[step.phase] > start]

    def _one(self, kind: str, step: Step) -> bool:
        self.trail.append(f"{kind}: {step.role} {step.task} {step.name}")
        doer: dict[str, Callable[[Step], bool]] = {
            **{STEP: self._kill, SIGNAL: self._signal, FAILED: self._fail, LIMIT: self._limit},
            **{FULL: self._fill, WORK: self._spoil_work, FINISHED: self._spoil_finished},
            **{RECORD: self._spoil_record, SECOND: self._second, FORCE: self._force},
        }
        start, known = time.monotonic(), len(self.trail)
        happened = doer[kind](step)
        if happened:
            self.tally.tried[kind] += 1
            self.hits[step.task] += 1
            self.done[kind] += 1
        else:
            self.tally.missed[kind] += 1
        said = " ".join(self.trail[known - 1 :]) + ("" if happened else ": came too late")
        print(f"{self.tally.tried.total():4} {time.monotonic() - start:5.1f} s  {said}", flush=True)
        return happened

    def _kill(self, step: Step, count: int = 1) -> bool:
        plan = self._plan(step, count=count, target=step.role)
        ended = self._session(step, plan)
        if not ended.hit:
            return False
        self.tally.steps.add(f"{step.role} {step.name}")
        self._check(ended.code == (6 if step.role == "stage" else -9), "SIGKILL", ended)
        return True

    def _signal(self, step: Step) -> bool:
        name = self.random.choice(["SIGINT", "SIGTERM", "SIGKILL"])
        target = self.random.choice(["stage", "run", "both"])
        delay = self.random.choice([0.0, self.random.uniform(0, 0.3)])
        plan = self._plan(step, signal=name, target=target, delay=delay)
        ended = self._session(step, plan)
        if not ended.hit:
            return False
        killed = name == "SIGKILL" and target != "stage"
        # With a delay the work, or all of it, may be done before the signal comes.
        allowed = {-9 if killed else 6} | ({0} if delay else set())
        self._check(ended.code in allowed, f"{name} to {target} after {delay:.2f} s", ended)
        return True

    def _fail(self, step: Step) -> bool:
        number = self.random.choice([errno.EIO, errno.ENOSPC])
        ended = self._session(step, self._plan(step, act="fail", errno=number))
        if not ended.hit:
            return False
        # Nothing is lost where a file that only helps cannot be written or deleted.
        self._check(ended.code in (0, 3), os.strerror(number), ended)
        return True

    def _limit(self, step: Step) -> bool:
        size = int(2 ** self.random.uniform(8, 17))
        ended = self._session(step, self._plan(step, act="limit", bytes=size))
        if not ended.hit or ended.code == 0:  # no file was larger
            return False
        self._check(ended.code == 3, f"no file above {size} bytes", ended)
        return True

    def _fill(self, step: Step) -> bool:
        if not self.disk.mounted:
            return False
        free = int(2 ** self.random.uniform(12, 19))
        with self.disk.nearly_full(free):
            ended = self._session(step, None)
        if ended.code == 0:  # it sufficed
            return False
        self._check(ended.code == 3 and "disk is full" in ended.output, f"{free} bytes", ended)
        return True

    def _spoil_work(self, step: Step) -> bool:
        """Kill a stage that has finished something, and damage a file of its work folder."""
        if not self._kill(step, self.random.choice([1, 2, 2, 3])):
            return False
        folders = [p for p in self.run.partials() if task_of(p) == step.task]
        files = sorted(p for folder in folders for p in folder.rglob("*") if p.is_file())
        if not (files := [p for p in files if p.stat().st_size]):
            return False
        self._damage(self.random.choice(files))
        self.spoilt[step.task] += 1
        return True

    def _spoil_finished(self, step: Step) -> bool:
        """Damage a file of a finished stage; sometimes run on, then repair."""
        files = [(p, f) for f in self.run.folders() for p in sorted(f.rglob("*")) if p.is_file()]
        if not files:
            return False
        path, folder = self.random.choice(files)
        self._damage(path)
        task = task_of(folder)
        if self.random.random() < 0.3:
            ended = self._session(step, None)
            fine = ended.code == 0 or (ended.code == 5 and str(path) in ended.output)
            self._check(fine and ("scmini repair" in ended.output or not ended.code), "run", ended)
        before = {p.name for p in self.run.partials()}
        ended = self.run.do("repair", sets=False)
        self._check(ended.code == 0 and str(path) in ended.output, "scmini repair", ended)
        goes_on = [p for p in self.run.partials() if p.name not in before]
        units = [p for folder in goes_on for p in folder.glob("*-[0-9]*")]
        # Without a checkpoint that an earlier repair did without, all steps are made again.
        self.spoilt[task] += 1 if units or folder.exists() else self.whole.units()[task]
        self.hits[task] += 1
        return True

    def _spoil_record(self, step: Step) -> bool:
        path = self.run.path / "run.json"
        if not path.exists():
            return False
        self._damage(path)
        ended = self.run.do("status", sets=False)
        self._check(ended.code == 0, "run.json damaged", ended)
        return True

    def _damage(self, path: Path) -> None:
        how = self.random.choice(["flip", "cut", "empty", "delete"])
        data = bytearray(path.read_bytes())
        if how == "delete":
            path.unlink()
        elif how == "flip" and data:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            path.write_bytes(data)
        else:
            path.write_bytes(b"" if how == "empty" or not data else data[: len(data) // 2] or b"")
            if not data:
                path.write_bytes(b"x")
        self.trail.append(f"  {how} {path.relative_to(self.run.root)}")

    def _second(self, step: Step) -> bool:
        """While a stage is held at a step, start a second run in its folder or its store."""
        before, paused = len(self.run.steps()), Path(f"{self.run.log}.paused")
        process = self.run.start(
            "run", "all", "--until", step.phase, plan=self._plan(step, act="pause")
        )
        try:
            end = time.monotonic() + _PATIENCE
            while not paused.exists() and process.poll() is None:
                self._check(time.monotonic() < end, "the first run hangs", None)
                time.sleep(0.02)
            hit = paused.exists()
            if hit:
                beside = self.random.random() < 0.5
                other = TinyRun(self.run.root, self.run.methods, "beside" if beside else "toy")
                second = other.do("run", "all", "--until", step.phase)
                self._check(second.code == 3, "the second run", second)
                shutil.rmtree(self.run.root / "disk" / "beside", ignore_errors=True)
        finally:
            Path(f"{self.run.log}.go").touch()
            ended = self.run.end(process, before)
            for name in (".go", ".paused"):
                Path(f"{self.run.log}{name}").unlink(missing_ok=True)
        self._check(ended.code == 0, "the first run", ended)
        return hit

    def _force(self, _: Step) -> bool:
        """Kill --force at a step; it goes on with --force, and without it nothing is lost."""
        stage = self.random.choice(FORCED)
        ready = self.run.do("run", "all", "--until", stage)
        self._check(ready.code == 0, "before --force", ready)
        names = ["rename final -> replaced", "rename work -> final", "remove replaced", "open lock"]
        names += [
            "mkdir work",
            "open work/log/forced",
            "rename work/.manifest.json.tmp -> work/manifest.json",
        ]
        plan = self.run.plan(role="stage", task=stage, step=self.random.choice(names))
        self.trail.append(f"  {stage}: {plan.step}")
        ended = self.run.do("run", stage, "--force", plan=plan)
        self.hits[stage] += 2
        if not ended.hit:
            return False
        self.tally.steps.add(f"stage {plan.step}")
        self._check(ended.code == 6, "SIGKILL", ended)
        for words in [[], ["--force"]][self.random.choice([0, 1]) :]:  # perhaps without it first
            again = self.run.do("run", stage, *words)
            self._check(again.code == 0, "the run that goes on", again)
        return True

    def _plan(self, step: Step, **more: Any) -> Plan:
        return self.run.plan(role=step.role, task=step.task, step=step.name, **more)

    def _session(self, step: Step, plan: Plan | None) -> Ended:
        # What belongs to no task happens with every one.
        until = ["--until", step.phase] if step.task or plan is None else []
        ended = self.run.do("run", "all", *until, plan=plan)
        self._check("Traceback" not in ended.output, "no traceback on the screen", ended)
        return ended

    def _check(self, fine: bool, what: str, ended: Ended | None) -> None:
        if not fine:
            said = f"exit {ended.code}\n{ended.output[-3000:]}" if ended else ""
            trail = "\n".join(self.trail)
            raise AssertionError(f"{what}: {said}\n{trail}\nto replay: {self.replay}")

    @property
    def replay(self) -> str:
        """The command that does the same again."""
        seed, name = self.seed.split()
        return f"SCMINI_FAULTS_SEED={seed} pytest tests/faults -m 'slow or not slow' -k '{name}'"

    def _compare(self) -> None:
        expected, found = result(self.whole), result(self.run)
        differing = [k for k in {**expected, **found} if expected.get(k) != found.get(k)]
        # Repair does without a damaged checkpoint of a finished stage, which nobody needs.
        differing = [k for k in differing if k in found or "/checkpoint-" not in k]
        shown = "\n".join(
            f"{k}: {expected.get(k)!r:.300}\n  {found.get(k)!r:.300}" for k in differing
        )
        self._check(not differing, f"other results:\n{shown}", None)
        self._check(not leftovers(self.run), f"left behind: {leftovers(self.run)}", None)
        once, done = self.whole.units(), self.run.units()
        for task in done:
            most = once[task] + self.hits[task] + self.spoilt[task]
            self._check(done[task] <= most, f"{task}: {done[task]} shards, at most {most}", None)
