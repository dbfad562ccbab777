"""How long the tasks that are still to do will take, where something is known about them.

In this order: what other methods of the same stage took in this run; what the same work took in
earlier ones (their manifests in the store); what `scmini plan` counts for a known card. Nothing is
made up for the rest.
"""

import contextlib
from collections import UserDict
from collections.abc import Iterable, Mapping
from pathlib import Path

from scmini.config import Config, num_negatives
from scmini.errors import ScminiError, StoreDamaged
from scmini.stage_graph import Task, recipe
from scmini.store import MANIFEST, Finished, Recipe, Store

_ALIKE = ("dpo", "generate", "reward", "benchmark", "judge")
"""Stages whose methods all take the same time, or that of their number of responses."""
_FREE = {
    *("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm"),
    *("beta", "loss_type", "label_smoothing", "rpo_alpha", "seed", "temperature", "top_p"),
    *("lora_alpha", "initializer_range", "keep_fraction"),
}
"""Keys that may differ between two runs that take the same time."""


def expected_seconds(
    config: Config,
    pending: Iterable[Task],
    finished: Mapping[Task, Finished],
    store: Store,
    planned: Mapping[Task, float],
) -> dict[Task, float]:
    """Seconds of each pending task of which something is known.

    Args:
        finished: the tasks of this run that are done.
        planned: seconds by the plan for this machine's card, if there is one.
    """
    pending = list(pending)
    earlier = _Earlier(config, finished, store, {task.stage for task in pending})
    found = {}
    for task in pending:
        seconds = _of_siblings(task, finished)
        if seconds is None:
            seconds = earlier.seconds(task)
        if seconds is None:
            seconds = planned.get(task)
        if seconds is not None:
            found[task] = seconds
    return found


def _of_siblings(task: Task, finished: Mapping[Task, Finished]) -> float | None:
    """What this task takes if its work costs what that of the other methods cost."""
    if task.stage not in _ALIKE:
        return None
    alike = [(_weight(other), f) for other, f in finished.items() if other.stage == task.stage]
    if not alike:
        return None
    return _weight(task) * sum(f.seconds for _, f in alike) / sum(weight for weight, _ in alike)


def _weight(task: Task) -> float:
    """Work of a task: for DPO in lengths of a text, prompt and k + 1 responses being alike."""
    return 2.0 + (num_negatives(task.method or "") or 1) if task.stage == "dpo" else 1.0


class _Earlier:
    """Finished stages of the store, to be compared with tasks."""

    def __init__(
        self, config: Config, finished: Mapping[Task, Finished], store: Store, stages: set[str]
    ) -> None:
        self._config = config
        self._known = _OrBlank(finished)
        self._data_is_known = Task("data") in finished
        self._by_stage: dict[str, list[Finished]] = {}
        for path in sorted(store.root.glob(f"[!.]*/{MANIFEST}")):
            if path.parent.name.split("-")[0] in stages:
                with contextlib.suppress(StoreDamaged, OSError, ValueError, KeyError, TypeError):
                    found = store.load(path.parent.name)
                    if found and found.seconds >= 0 and _is_whole(found.recipe):
                        self._by_stage.setdefault(found.recipe.stage, []).append(found)

    def seconds(self, task: Task) -> float | None:
        """What the same work took, or else that for another method; of several times the last.

        None if it was never done.
        """
        if task.stage == "data" or not (others := self._by_stage.get(task.stage)):
            return None
        try:
            mine = recipe(self._config, task, self._known)
        except (ScminiError, OSError):  # a file is missing; the task will say so itself
            return None
        alike = [other for other in others if self._is_alike(mine, other.recipe)]

        def nearness(found: Finished) -> tuple[bool, str]:
            return found.recipe.method == task.method, str(found.manifest.get("finished"))

        if (best := max(alike, key=nearness, default=None)) is None:
            return None
        done = Task(best.recipe.stage, best.recipe.method)
        return best.seconds * _weight(task) / _weight(done)

    def _is_alike(self, mine: Recipe, other: Recipe) -> bool:
        if mine.method != other.method and mine.stage not in _ALIKE:
            return False
        if "data" in mine.inputs and not self._data_is_known:
            return False
        same_data = mine.inputs.get("data") == other.inputs.get("data")
        return same_data and _essence(mine.config) == _essence(other.config)


def _is_whole(found: Recipe) -> bool:
    return isinstance(found.config, dict) and isinstance(found.inputs, dict)


class _OrBlank(UserDict[Task, Finished]):
    """Finished tasks, and in place of any other one that made no files."""

    def __missing__(self, task: Task) -> Finished:
        return Finished(Path(task.key), {"files": {}})


def _essence(config: Mapping[str, object]) -> dict[str, object]:
    """Settings without those that do not matter to the time."""
    return {
        key: _essence(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _FREE
    }
