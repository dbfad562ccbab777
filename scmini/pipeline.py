"""Runs what is not finished, one process per stage, and says what is.

Recipes are known from the top down: a task's recipe holds the digests of the files that it reads,
so it exists once these are finished. A stage that is run again and makes the same files leaves all
that follows valid.
"""

import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import groupby, takewhile
from pathlib import Path
from typing import IO, Any

from scmini.child_process import Signals, begin, brief, ending, lines, stop, tail
from scmini.config import Config
from scmini.config_file import config_to_yaml
from scmini.console import clean, duration, say, size
from scmini.download import offline_environment
from scmini.errors import (
    EnvironmentProblem,
    Interrupted,
    ScminiError,
    StageFailed,
    StoreBusy,
    StoreDamaged,
    UsageError,
)
from scmini.locks import locked
from scmini.run_folder import RunFolder
from scmini.run_status import status as status
from scmini.run_status import store_root as store_root
from scmini.stage_graph import STAGES, Task, check_sources, check_stage, inputs, recipe, tasks
from scmini.store import Finished, Recipe, Store, disk_full_is_said
from scmini.view.forecast import expected_seconds
from scmini.view.live import RunDisplay
from scmini.view.outcome import outcome

WORKER = [sys.executable, "-P", "-m", "scmini.worker"]


def run(
    config: Config,
    run_dir: Path,
    *,
    only: str | None = None,
    from_: str | None = None,
    until: str | None = None,
    force: bool = False,
    planned: Mapping[Task, float] | None = None,
) -> dict[Task, Finished]:
    """Finish the stages of a run: all, one (`only`), or a range (`from_`, `until`; both included).

    Args:
        force: make the stages anew even where they are finished.
        planned: seconds of tasks on this machine's card by the plan, to tell how long it will take.

    Returns:
        The tasks up to the last chosen stage, all of them finished for this configuration.

    Raises:
        EnvironmentProblem: the disk is full.
        UsageError: a stage before the chosen ones is not finished.
        StageFailed: a stage's process ended badly; carries its exit code.
        Interrupted: stopped by a signal; everything finished and half-finished is kept.
    """
    chosen = _chosen(config, only, from_, until)
    check_sources(config, RunFolder(run_dir).finished_stages)
    return _Run(config, run_dir, chosen, force, only or "all", planned or {}).all()


def _chosen(config: Config, only: str | None, from_: str | None, until: str | None) -> list[str]:
    names = list(STAGES)
    if only is not None:
        return [check_stage(config, only)]
    first = names.index(check_stage(config, from_)) if from_ else 0
    last = names.index(check_stage(config, until)) if until else len(names) - 1
    if first > last:
        raise UsageError(f"--from {from_} comes after --until {until}")
    return names[first : last + 1]


class _Run:
    """One `scmini run`."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        chosen: list[str],
        force: bool,
        what: str,
        planned: Mapping[Task, float],
    ) -> None:
        self.config, self.chosen, self.force, self.what = config, chosen, force, what
        self.current = chosen[0]
        self.path = run_dir
        self.tasks = tasks(config)
        self.store = Store(store_root(run_dir))
        self.planned = planned
        self.signals = Signals()
        self.finished: dict[Task, Finished] = {}
        self.built: set[Task] = set()

    @property
    def resume(self) -> str:
        """The command that goes on from here."""
        first, *_, last = STAGES
        command = f"scmini run {self.what} -o {shlex.quote(str(self.path))}"
        if self.what == "all" and self.force and self.current != first:
            command += f" --from {self.current}"  # those before it are made anew already
        if self.what == "all" and self.chosen[-1] != last:
            command += f" --until {self.chosen[-1]}"
        return f"{command} --force" if self.force else command

    def all(self) -> dict[Task, Finished]:
        """Finish every chosen task; returns what is finished."""
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"another scmini run is working in {self.path}"
        with (
            self._next_command(),
            disk_full_is_said(self.path),
            locked(self.path / ".lock", busy),
        ):
            self.folder = RunFolder(self.path)
            self.folder.begin(self.config, self.tasks)
            try:
                with (
                    self.signals.caught(),
                    RunDisplay(self.config.name, self.path, self._wanted()) as self.display,
                ):
                    for phase, group in groupby(self._wanted(), key=lambda task: task.phase):
                        self._phase(phase, list(group))
            except Interrupted as error:
                raise Interrupted(f"{error}; {self._kept()}") from None
        say(outcome(self.path, self.finished, self.built))
        if not self.built and len(self.finished) == len(self.tasks):
            say("Nothing to run: all of it is finished.")
        elif not self.built:
            say(f"Nothing to run up to {self.chosen[-1]}: it is finished.")
        return self.finished

    @contextlib.contextmanager
    def _next_command(self) -> Iterator[None]:
        """Add to what went wrong what can be typed next."""
        folder = shlex.quote(str(self.path))
        try:
            yield
        except StoreBusy as error:
            watch = f"scmini status --watch -o {folder}"
            raise StoreBusy(f"{error}\nto watch it: {watch}") from error
        except StoreDamaged as error:
            repair = f"scmini repair -o {folder} && {self.resume}"
            raise StoreDamaged(f"{error}\nto go on: {repair}") from error
        except EnvironmentProblem as error:
            raise EnvironmentProblem(f"{error}\nto go on: {self.resume}") from error

    def _wanted(self) -> list[Task]:
        """All tasks up to the last chosen stage."""
        stages = list(STAGES)
        last = stages.index(self.chosen[-1])
        return list(takewhile(lambda task: stages.index(task.phase) <= last, self.tasks))

    def _phase(self, phase: str, group: list[Task]) -> None:
        before = len(self.built)
        for _, same in groupby(group, key=lambda task: task.stage):
            self._stage(phase, list(same))
        if len(self.built) > before:
            self._forecast()
            self.display.stage_ended(phase)

    def _forecast(self) -> None:
        pending = [task for task in self._wanted() if task not in self.finished]
        self.display.expected = expected_seconds(
            self.config, pending, self.finished, self.store, self.planned
        )

    def _stage(self, phase: str, group: list[Task]) -> None:
        """Finish the tasks of a stage; those that read from one another take several processes."""
        waiting = group
        if phase in self.chosen:
            self.current = phase
        while waiting:
            ready = [t for t in waiting if all(i.task in self.finished for i in self._inputs(t))]
            pending = []
            for task in ready:
                made = recipe(self.config, task, self.finished)
                found = self.store.find(made)
                if found and not (self.force and phase in self.chosen):
                    self.store.tidy(found)
                    self._done(task, found)
                    self.display.kept(task, found.seconds)
                else:
                    pending.append((task, made))
            if pending and phase not in self.chosen:
                raise UsageError(self._unfinished(pending[0][0]))
            if pending:
                self._forecast()
                _Child(self, pending).work()
            waiting = [task for task in waiting if task not in ready]

    def _inputs(self, task: Task) -> Any:
        return inputs(self.config, task).values()

    def _unfinished(self, task: Task) -> str:
        return (
            f"{self.chosen[0]} needs {task.label}, which is not finished for this configuration: "
            f"scmini run all --until {task.phase} -o {shlex.quote(str(self.path))}"
        )

    def _done(self, task: Task, found: Finished) -> None:
        self.finished[task] = found
        self.folder.finish(task, found)

    def completed(self, task: Task, folder: str) -> None:
        """A process says that it finished a task."""
        found = self.store.load(folder)
        if found is None:
            raise ScminiError(f"{self.store.root / folder} is not there")
        self.built.add(task)
        self._done(task, found)
        self._forecast()  # the other methods of this stage, in the same process, will take as long
        text = f"done in {duration(found.seconds)}, {size(found.size)}"
        self.display.done(task, found.seconds, text)

    def _kept(self) -> str:
        return (
            f"{len(self.finished)} of {len(self.tasks)} tasks are finished\n"
            "what was begun goes on from its last checkpoint or shard, else from its start\n"
            f"to go on: {self.resume}"
        )


class _Child:
    """The process that does some tasks of one stage."""

    def __init__(self, run: _Run, pending: list[tuple[Task, Recipe]]) -> None:
        self.run = run
        self.recipes = dict(pending)
        self.current = pending[0][0]
        self.error: dict[str, Any] | None = None
        self.logged = {task: len(self._logged(task)) for task in self.recipes}

    def work(self) -> None:
        """Start the process, follow its events, and raise what went wrong."""
        job = self.run.path / f".job-{self.current.stage}.json"
        job.write_text(json.dumps(self._job()), encoding="utf-8")
        try:
            with tempfile.TemporaryFile() as output:
                code = self._follow(job, output)
                if code or any(task not in self.run.finished for task in self.recipes):
                    raise self._failure(code, output)
        finally:
            job.unlink(missing_ok=True)

    def _job(self) -> dict[str, Any]:
        entries = []
        for task, made in self.recipes.items():
            sources = {
                key: {"folder": self.run.finished[i.task].path.name, "patterns": i.patterns}
                for key, i in inputs(self.run.config, task).items()
            }
            entries.append({"recipe": asdict(made), "inputs": sources})
        return {
            "parent": os.getpid(),
            "store": str(self.run.store.root.resolve()),
            "config": config_to_yaml(self.run.config),
            "force": self.run.force,
            "tasks": entries,
        }

    def _follow(self, job: Path, output: IO[bytes]) -> int:
        offline = offline_environment(self.run.config, self.current.stage)
        self.run.display.prepare(self.current)
        process, receive = begin([*WORKER, str(job)], output, offline)
        try:
            for line in lines(receive, process):
                if line is not None:
                    self._take(json.loads(line))
                self.run.display.tick(process.pid)
            return process.wait()
        except Interrupted:
            self.run.display.line("stopping; progress is kept (once more: at once)")
            self.run.display.ended(self.current, "stopped")
            raise
        finally:
            try:
                os.close(receive)
            finally:
                stop(process, self.run.signals)

    def _take(self, event: dict[str, Any]) -> None:
        display, kind = self.run.display, event["event"]
        if kind == "start":
            self.current = next(task for task in self.recipes if task.key == event["task"])
            display.begin(self.current)
        elif kind == "progress":
            display.progress(self.current.label, event)
        elif kind == "finish":
            self.run.completed(self.current, event["folder"])
        elif kind == "example":
            display.example(self.current.label, event)
        elif kind == "error":
            self.error = event
        else:
            prefix = "warning: " if kind == "warn" else ""
            display.line(f"{self.current.label}: {prefix}{event['text']}")

    def _log(self, task: Task) -> Path:
        return self.run.store.partial(self.recipes[task]) / "log" / "text.log"

    def _logged(self, task: Task) -> bytes:
        """What libraries said, in this process and in those that were killed before."""
        log = self._log(task)
        return log.read_bytes() if log.is_file() else b""

    def _failure(self, code: int, output: IO[bytes]) -> ScminiError:
        """What to tell the person about a process that ended badly."""
        label = self.current.label
        if self.error is not None:
            message, code = clean(self.error["message"]), self.error["code"]
            message = message if self.error["expected"] else brief(message)
        else:
            message, code = ending(code)
        self.run.display.ended(self.current, "stopped" if code == 6 else "failed")
        text = f"{label}: {message}"
        if self.error is None or not self.error["expected"]:
            output.seek(0)
            said = tail(self._logged(self.current)[self.logged[self.current] :]) or tail(
                output.read()
            )
            text += f"\n{said}\nlog: {self._log(self.current)}" if said else ""
        if self.error is None or not self.error["busy"]:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                self.run.folder.fail(self.current, self.recipes[self.current].digest, message)
        first = f"scmini repair -o {shlex.quote(str(self.run.path))} && "
        resume = f"{first if 'scmini repair' in message else ''}{self.run.resume}"
        return StageFailed(label, code, f"{text}\nto go on: {resume}")
