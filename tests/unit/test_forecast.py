"""What is known beforehand of the time of tasks, and the table after a run."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_stages import METHODS, config, put_in_place

from scmini import pipeline
from scmini.stage_graph import Task, tasks
from scmini.store import Finished, Store
from scmini.view.forecast import expected_seconds
from scmini.view.outcome import MOST_ROWS, outcome


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with the stand-ins whose manifests say that the n-th task took n seconds."""
    folder = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patch:
        put_in_place(folder, patch)
        finished = pipeline.run(config(), folder / "toy")
    for number, (task, found) in enumerate(finished.items()):
        found.manifest["seconds"] = float(number)
        (found.path / "manifest.json").write_text(json.dumps(found.manifest))
        assert Store(folder / ".store").load(found.path.name) == Finished(
            found.path, found.manifest
        )
        assert task in tasks(config())
    return folder, finished


def expected(ran: Any, *overrides: str, done: int = 1, planned: Any = None) -> dict[Task, float]:
    folder, finished = ran
    c = config(*overrides)
    known = dict(list(finished.items())[:done])
    pending = [task for task in tasks(c) if task not in known]
    return expected_seconds(c, pending, known, Store(folder / ".store"), planned or {})


def test_the_same_work_of_an_earlier_run(ran: Any) -> None:
    seconds = {task: float(number) for number, task in enumerate(ran[1])}
    del seconds[Task("data")]
    assert expected(ran) == seconds
    assert expected(ran, "dpo.beta=0.3", "sft.learning_rate=1e-3") == seconds


def test_other_work_is_not_claimed(ran: Any) -> None:
    found = expected(ran, "sft.num_train_epochs=7", "generate.max_new_tokens=3")
    assert Task("sft") not in found
    assert not any(task.stage == "generate" for task in found)
    assert Task("sample") in found
    assert expected(ran, done=0) == {}, "the data may be others"


def test_other_methods_of_this_run(ran: Any) -> None:
    order = list(ran[1])
    first = order.index(Task("dpo", "dpo"))
    found = expected(ran, "dpo.num_train_epochs=3", done=first + 1)
    assert found[Task("dpo", "self-contrast-1")] == first
    assert found[Task("dpo", "self-contrast-4")] == first * 6 / 3  # prompt and 5 answers, or 2
    generate = order.index(Task("generate", "sft"))
    found = expected(ran, "generate.max_new_tokens=3", done=generate + 1)
    assert found[Task("generate", "dpo")] == generate


def test_another_method_of_an_earlier_run(ran: Any) -> None:
    more = json.dumps([*METHODS, "self-contrast-2"])
    seconds = {task: float(number) for number, task in enumerate(ran[1])}
    found = expected(ran, f"methods={more}")
    others = [seconds[task] for task in ran[1] if task.stage == "generate"]
    assert found[Task("generate", "self-contrast-2")] in others
    near = {seconds[Task("dpo", f"self-contrast-{k}")] * 4 / (2 + k) for k in (1, 4)}
    assert found[Task("dpo", "self-contrast-2")] in {*near, seconds[Task("dpo", "dpo")] * 4 / 3}


def test_the_plan_where_nothing_else_is_known(ran: Any) -> None:
    planned = {Task("sft"): 77.0, Task("sample"): 78.0}
    found = expected(ran, "sft.num_train_epochs=7", planned=planned)
    assert found[Task("sft")] == 77.0
    assert found[Task("sample")] != 78.0


@pytest.mark.parametrize("change", [{"seconds": "x"}, {"seconds": -1}, {"seconds": None}])
def test_odd_manifests_are_passed_over(ran: Any, change: dict[str, Any]) -> None:
    folder, finished = ran
    path = finished[Task("report")].path / "manifest.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **change}))
    odd = json.loads(before)
    odd["recipe"]["config"] = odd["recipe"]["inputs"] = [1]
    other = folder / ".store" / "report-odd"
    other.mkdir(exist_ok=True)
    (other / "manifest.json").write_text(json.dumps(odd))
    try:
        assert Task("report") not in expected(ran)
    finally:
        path.write_text(before)


def test_a_table_of_what_was_made(ran: Any, tmp_path: Path) -> None:
    _, finished = ran
    few = dict(list(finished.items())[:3])
    lines = outcome(Path("runs/toy"), few, [Task("data")]).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["data", "done", "0.0", "s", *lines[1].split()[4:8], "data"],
        ["base", "kept", "1.0", "s", *lines[2].split()[4:8], "base"],
    ]
    assert lines[-1].split()[:3] == ["all", "3.0", "s"]
    assert lines[-1].endswith("runs/toy")

    assert len(finished) > MOST_ROWS
    made = [task for task in finished if task.stage == "reward"][:2]
    text = outcome(Path("runs/toy"), finished, made)
    lines = text.splitlines()
    rows = {line.split()[0].rstrip(","): line for line in lines}
    assert max(map(len, lines)) < 80
    assert list(rows) == ["stage", *dict.fromkeys(task.phase for task in finished), "all"]
    assert f"generate, {len(METHODS)} tasks  kept" in rows["generate"]
    assert f"reward, {len(METHODS)} tasks    2 done" in rows["reward"]
    assert rows["generate"].endswith("generations/")
    assert rows["sft"].endswith("sft/, models/")
    assert rows["filter"].endswith("similarity")
