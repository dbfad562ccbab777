"""After a run: what was made, and where it is."""

from collections.abc import Collection, Mapping
from itertools import groupby
from pathlib import Path, PurePath

from scmini.console import duration, size, table
from scmini.run_folder import links
from scmini.stage_graph import Task
from scmini.store import Finished

MOST_ROWS = 14
"""More than these, with the results below them, would not fit a screen of 24 lines."""
_HEAD = ["stage", "state", "time", "size", "peak", "where"]


def outcome(run_dir: Path, finished: Mapping[Task, Finished], built: Collection[Task]) -> str:
    """A table of the finished tasks: a row for each or, where these are many, for each stage.

    Args:
        finished: in the order of the stages.
        built: those that were made just now; the others were kept.
    """
    each = [[task] for task in finished]
    if len(each) > MOST_ROWS:
        each = [list(same) for _, same in groupby(finished, key=lambda task: task.phase)]
    rows = [_row(same, finished, built) for same in each]
    total = sum(found.seconds for found in finished.values())
    whole = size(sum(found.size for found in finished.values()))
    return table(_HEAD, [*rows, ["all", "", duration(total), whole, "", str(run_dir)]])


def _row(
    tasks: list[Task],
    finished: Mapping[Task, Finished],
    built: Collection[Task],
) -> list[str]:
    made = sum(task in built for task in tasks)
    state = "kept" if not made else "done" if made == len(tasks) else f"{made} done"
    label = tasks[0].label if len(tasks) == 1 else f"{tasks[0].phase}, {len(tasks)} tasks"
    found = [finished[task] for task in tasks]
    return [
        label,
        state,
        duration(sum(each.seconds for each in found)),
        size(sum(each.size for each in found)),
        _peak(found),
        _where(tasks),
    ]


def _peak(found: list[Finished]) -> str:
    """The most memory that one of them took."""
    notes = [each.manifest.get("notes", {}).get("peak_gib") for each in found]
    known = [note for note in notes if isinstance(note, int | float)]
    return size(max(known) * 2**30) if known else ""


def _where(tasks: list[Task]) -> str:
    """In the run folder: the path of the products, or the folders in which all of them lie."""
    names = [PurePath(next(iter(links(task)))) for task in tasks]
    if len(names) == 1:
        return str(names[0])
    return ", ".join(dict.fromkeys(f"{name.parts[0]}/" for name in names))
