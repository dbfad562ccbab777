"""The process of one stage: `python -m scmini.worker JOB`.

It does the tasks of its job one after another (imports are paid once) and ends, which is the only
sure way of giving GPU memory back. What it has to say goes to the parent as events; whatever
libraries print goes to `log/text.log` in the folder of the task.
"""

import contextlib
import ctypes
import errno
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scmini import console
from scmini.config import Config
from scmini.config_file import parse_config
from scmini.errors import DoesNotFit, EnvironmentProblem, Interrupted, ScminiError, StoreBusy
from scmini.quoting import redact
from scmini.stage_graph import Task, sections
from scmini.store import Recipe, Store, Work

EVENTS_VARIABLE = "SCMINI_EVENTS"
_PR_SET_PDEATHSIG = 1
StageRun = Callable[[Config, dict[str, Path], Work], None]


def main(job_path: Path) -> int:
    """Do a job; the exit code is that of DESIGN 5.1."""
    job = json.loads(job_path.read_bytes())
    _die_with(job["parent"])
    console.send_events_to(int(os.environ.pop(EVENTS_VARIABLE)))
    config = parse_config(job["config"], "the configuration of this run")
    store = Store(Path(job["store"]))
    for entry in job["tasks"]:
        try:
            _do(config, store, entry, force=job["force"])
        except BaseException as error:
            return _report(config, entry, error)
    return 0


def load_stage(name: str) -> StageRun:
    """The `run` of a stage."""
    run: StageRun = importlib.import_module(f"scmini.stages.{name}").run
    return run


def _do(config: Config, store: Store, entry: dict[str, Any], *, force: bool) -> None:
    recipe = Recipe(**entry["recipe"])
    key = Task(recipe.stage, recipe.method).key
    console.emit({"event": "start", "task": key})
    with store.building(recipe, force=force) as work:
        if work is not None:
            with _output_to(work.path / "log" / "text.log"):
                try:
                    folders = _verified_inputs(store, entry["inputs"])
                    if recipe.stage == "report":
                        _plan_beside(config, folders, work)
                    load_stage(recipe.stage)(config, folders, work)
                except Exception:
                    with contextlib.suppress(OSError):  # a full disk must not hide the error
                        print(redact(traceback.format_exc()), file=sys.stderr)
                    raise
            _note_machine(work)
    console.emit({"event": "finish", "task": key, "folder": recipe.folder})


def _verified_inputs(store: Store, inputs: dict[str, Any]) -> dict[str, Path]:
    """Folders of the inputs; every file that will be read is checked against its manifest."""
    folders = {}
    for key, source in inputs.items():
        finished = store.load(source["folder"])
        if finished is None:
            raise EnvironmentProblem(f"{store.root / source['folder']} disappeared; run again")
        store.verify(finished, source["patterns"])
        folders[key] = finished.path
    return folders


def _plan_beside(config: Config, folders: dict[str, Path], work: Work) -> None:
    """Write what was planned into the folder of the report, which may not ask the planner."""
    from scmini.planning.beside import write_plan

    write_plan(config, folders, work.path)


def _note_machine(work: Work) -> None:
    """Peak memory of this process so far, and what it ran on."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
        torch.cuda.reset_peak_memory_stats()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak, device = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "cpu"
    work.notes.setdefault("peak_gib", round(peak / 2**30, 3))
    work.notes.setdefault("device", device)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Append stdout and stderr, those of libraries in C too, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _report(config: Config, entry: dict[str, Any], error: BaseException) -> int:
    """Tell the parent what went wrong; returns the exit code."""
    task = Task(entry["recipe"]["stage"], entry["recipe"]["method"])
    known = _as_known(config, task, error)
    if known is None:
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
        message, code = f"{type(error).__name__}: {error}", 1
    else:
        message, code = str(known), known.exit_code
    flags = {"expected": known is not None, "busy": isinstance(error, StoreBusy)}
    console.emit({"event": "error", "message": message, "code": code, **flags})
    return code


def _as_known(config: Config, task: Task, error: BaseException) -> ScminiError | None:
    """The error as one that a person can act on, if it is one."""
    if isinstance(error, ScminiError):
        return error
    if isinstance(error, KeyboardInterrupt):  # sent to this process alone
        return Interrupted("stopped by SIGINT; progress is kept")
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("scmini"):
        return EnvironmentProblem(
            f"the Python package {error.name!r} is missing: pip install {error.name}"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EnvironmentProblem(f"{error.filename}: {error.strerror}; give this user the right")
    if _is_out_of_memory(error):
        return DoesNotFit(f"out of memory; {_memory_remedy(config, task)}")
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:  # else nobody can have said so, and importing it takes seconds
        return False
    from scmini.models.memory import is_out_of_memory

    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or is_out_of_memory(error)


def _memory_remedy(config: Config, task: Task) -> str:
    for name in reversed(sections(task)):
        section = getattr(config, name)
        for knob in ("tokens_per_microbatch", "tokens_per_batch", "batch_size"):
            if hasattr(section, knob):
                return f"lower {name}.{knob} (now {getattr(section, knob)}): results stay the same"
    return "close other programs or use a machine with more memory"


def _die_with(parent: int) -> None:
    """Have the kernel end this process when the parent ends, even if that is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(6)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
