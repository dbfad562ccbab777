"""What of a run is done, stale, missing, running or failed, and why. Nothing is changed."""

import os
from pathlib import Path
from typing import Any

from scmini.config import Config
from scmini.errors import EnvironmentProblem, ScminiError
from scmini.run_folder import RunFolder
from scmini.stage_graph import Task, inputs, recipe, tasks
from scmini.store import Finished, Store, explain


def store_root(run_dir: Path) -> Path:
    """Where the finished stages of a run are: shared by all runs side by side with it."""
    named = os.environ.get("SCMINI_STORE")
    if named and os.path.lexists(named) and not os.path.isdir(named):
        raise EnvironmentProblem(f"SCMINI_STORE: {named} is no folder; name one, or unset it")
    return Path(named) if named else run_dir.resolve().parent / ".store"


def status(config: Config, run_dir: Path) -> dict[str, Any]:
    """The state of every task of a run, in the shape of `scmini status --json` (DESIGN 5.1)."""
    store, folder = Store(store_root(run_dir)), RunFolder(run_dir)
    finished: dict[Task, Finished] = {}
    rows = []
    for task in tasks(config):
        state, reason = _state(config, task, store, folder, finished)
        found = finished.get(task)
        row: dict[str, Any] = {
            "name": task.stage,
            "method": task.method,
            "state": state,
            "reason": reason,
        }
        row["seconds"] = found.seconds if found else None
        row["bytes"] = found.size if found else None
        row["path"] = str(found.path) if found else None
        rows.append(row)
    return {"run": str(run_dir), "stages": rows}


def _state(
    config: Config, task: Task, store: Store, folder: RunFolder, finished: dict[Task, Finished]
) -> tuple[str, str]:
    """State and reason; a done task is put into `finished`."""
    entry = folder.entry(task)
    waits = [i.task.label for i in inputs(config, task).values() if i.task not in finished]
    if waits:
        first, more = list(dict.fromkeys(waits))[:3], len(dict.fromkeys(waits)) - 3
        reason = f"waits for {', '.join(first)}" + (f" and {more} more" if more > 0 else "")
        return ("stale" if entry.get("folder") else "missing"), reason
    try:
        made = recipe(config, task, finished)
        found = store.find(made)
        before = store.load(entry["folder"]) if entry.get("folder") else None
    except ScminiError as error:
        return "failed", str(error)
    if found:
        finished[task] = found
    if store.is_building(made):
        return "running", ""
    if found:
        return "done", ""
    failed = entry.get("failed")
    if failed and failed["digest"] == made.digest:
        return "failed", failed["message"]
    if before:
        return "stale", "; ".join(explain(before.recipe, made))
    if store.partial(made).exists():
        return "missing", "begun; goes on from what it kept"
    gone = "its folder was set aside or deleted"
    return "missing", gone if entry.get("folder") else "never run"
