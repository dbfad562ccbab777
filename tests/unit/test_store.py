"""The store: a folder that exists is complete, whatever happens while it is made."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scmini.errors import StoreBusy, StoreDamaged
from scmini.locks import is_locked, locked
from scmini.store import Finished, Recipe, Store, digest_of, explain, write_atomic

RECIPE = Recipe(
    "dpo", "self-contrast-4", 1, {"dpo": {"beta": 0.1}}, {"data.path x": "1"}, {"sft": "2"}
)


def build(store: Store, recipe: Recipe = RECIPE, **files: str) -> Finished:
    with store.building(recipe) as work:
        assert work is not None
        for name, text in (files or {"a.txt": "hello"}).items():
            write_atomic(work.path / name, text.encode())
    found = store.find(recipe)
    assert found is not None
    return found


def test_a_finished_stage(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    assert store.find(RECIPE) is None
    with store.building(RECIPE) as work:
        assert work is not None
        assert work.method == "self-contrast-4"
        (work.path / "sub").mkdir()
        (work.path / "sub" / "b.txt").write_text("b")
        (work.path / "metrics.jsonl").write_text("times")
        (work.path / "scratch").mkdir()
        (work.path / "scratch" / "junk").write_text("x")
        (work.path / ".torn.tmp").write_text("x")
        work.count("blank")
        work.count("blank", 2)
        work.note("peak_gib", 1.5)
        assert store.is_building(RECIPE)
    found = store.find(RECIPE)
    assert found is not None
    assert not store.is_building(RECIPE)
    assert found.path.name == f"dpo-self-contrast-4-{RECIPE.digest[:12]}"
    assert found.recipe == RECIPE
    assert set(found.manifest["files"]) == {"sub/b.txt", "metrics.jsonl", ".torn.tmp"}
    assert found.manifest["files"]["sub/b.txt"]["bytes"] == 1
    assert found.manifest["counts"] == {"blank": 3}
    assert found.manifest["notes"] == {"peak_gib": 1.5}
    assert found.manifest["versions"]["python"].startswith("3.")
    assert sorted(p.name for p in store.root.iterdir()) == [found.path.name]
    store.verify(found)


def test_a_finished_stage_is_not_built_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    build(store)
    with store.building(RECIPE) as work:
        assert work is None


def test_digests_see_what_is_read_and_no_times(tmp_path: Path) -> None:
    one = build(
        Store(tmp_path / "1"), **{"a.txt": "1", "b.txt": "1", "metrics.jsonl": "1"}
    ).manifest
    two = build(
        Store(tmp_path / "2"), **{"a.txt": "1", "b.txt": "2", "metrics.jsonl": "2"}
    ).manifest
    three = build(
        Store(tmp_path / "3"), **{"a.txt": "1", "b.txt": "2", "metrics.jsonl": "3"}
    ).manifest
    assert digest_of(one, ("a.*",)) == digest_of(two, ("a.*",))
    assert digest_of(one, ("b.*",)) != digest_of(two, ("b.*",))
    assert one["products"] != two["products"]
    assert two["products"] == three["products"]
    assert digest_of(one, ("a.txt",)) != digest_of(one, ("b.txt",))  # names count, not only bytes


def test_an_exception_keeps_the_work(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="oops"), store.building(RECIPE) as work:  # noqa: PT012
        assert work is not None
        (work.path / "shard").write_text("1")
        (work.path / ".shard2.tmp").write_text("half")
        raise ValueError("oops")
    assert store.find(RECIPE) is None
    time.sleep(0.05)
    with store.building(RECIPE) as work:
        assert work is not None
        assert sorted(p.name for p in work.path.iterdir()) == ["log", "shard"]
    found = store.find(RECIPE)
    assert found is not None
    assert set(found.manifest["files"]) == {"shard"}


def test_seconds_of_interrupted_sessions_add_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.building(RECIPE) as work:  # noqa: PT012
        assert work is not None
        time.sleep(0.3)
        (work.path / "x").write_text("1")
        raise KeyboardInterrupt
    time.sleep(1.0)  # not counted
    with store.building(RECIPE):
        time.sleep(0.2)
    found = store.find(RECIPE)
    assert found is not None
    assert 0.45 <= found.seconds < 1.0


KILLED = """
import os, signal, sys, time
from pathlib import Path
from scmini import store as s
from tests_recipe import RECIPE
store, steps = s.Store(Path(sys.argv[1])), int(sys.argv[2])
calls = 0
def counted(function):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper
for name in ("fsync", "replace", "rename"):
    setattr(os, name, counted(getattr(os, name)))
with store.building(RECIPE, force=len(sys.argv) > 3) as work:
    if work is not None:
        for number in range(3):
            path = work.path / f"part-{number}"
            if not path.exists():
                s.write_atomic(path, b"x" * 1000 * (number + 1))
"""


@pytest.fixture
def killed(tmp_path: Path):
    (tmp_path / "tests_recipe.py").write_text(
        f"from scmini.store import Recipe\nRECIPE = {RECIPE!r}\n"
    )
    (tmp_path / "killed.py").write_text(KILLED)

    def start(root: Path, steps: int, *more: str) -> int:
        path = os.pathsep.join([str(tmp_path), *sys.path])
        command = [sys.executable, str(tmp_path / "killed.py"), str(root), str(steps), *more]
        return subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, check=False
        ).returncode

    return start


def test_sigkill_at_every_write(tmp_path: Path, killed) -> None:
    """Whichever of its system calls is the last: complete or absent, and it ends the same."""
    calm = Store(tmp_path / "calm")
    assert killed(calm.root, 0) == 0
    want = calm.find(RECIPE)
    assert want is not None
    deaths = 0
    for steps in range(1, 60, 3):
        store = Store(tmp_path / f"s{steps}")
        code = killed(store.root, steps)
        found = store.find(RECIPE)
        if code == 0:
            assert found is not None
            break
        deaths += 1
        assert code == -signal.SIGKILL
        if found is None:
            assert killed(store.root, 0) == 0
            found = store.find(RECIPE)
        assert found is not None
        store.verify(found)
        assert found.manifest["products"] == want.manifest["products"]
    assert deaths >= 5


def test_sigkill_while_forcing_leaves_a_finished_stage(tmp_path: Path, killed) -> None:
    store = Store(tmp_path / "s")
    assert killed(store.root, 0) == 0
    code, steps = -signal.SIGKILL, 0
    while code != 0:
        steps += 2
        code = killed(store.root, steps, "force")
        with store.building(RECIPE) as work:
            assert work is None
        found = store.find(RECIPE)
        assert found is not None
        store.verify(found)
    assert steps > 10


def test_force_replaces_when_complete(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = build(store, **{"a.txt": "old"})
    with pytest.raises(ValueError, match="no"), store.building(RECIPE, force=True) as work:
        raise ValueError("no")
    assert (old.path / "a.txt").read_text() == "old"
    with store.building(RECIPE, force=True) as work:
        assert work is not None
        (work.path / "a.txt").write_text("new")
        assert (old.path / "a.txt").read_text() == "old"
    assert (old.path / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == [RECIPE.folder]


@pytest.mark.parametrize("began_with_force", [False, True])
def test_force_goes_on_only_with_its_own_work(tmp_path: Path, began_with_force: bool) -> None:
    store = Store(tmp_path)
    build(store)
    if began_with_force:
        with pytest.raises(KeyboardInterrupt), store.building(RECIPE, force=True) as work:  # noqa: PT012
            assert work is not None
            (work.path / "shard").touch()
            raise KeyboardInterrupt
    else:
        (store.partial(RECIPE) / "shard").mkdir(parents=True)
    with store.building(RECIPE, force=True) as work:
        assert work is not None
        assert (work.path / "shard").exists() == began_with_force
    found = store.find(RECIPE)
    assert found is not None
    assert set(found.manifest["files"]) == ({"shard"} if began_with_force else set())
    assert not list(found.path.rglob("forced"))


def test_force_keeps_what_was_begun_of_an_unfinished_stage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.building(RECIPE) as work:  # noqa: PT012
        assert work is not None
        (work.path / "shard").touch()
        raise KeyboardInterrupt
    with store.building(RECIPE, force=True) as work:
        assert work is not None
        assert (work.path / "shard").exists()


def test_two_builders(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.building(RECIPE), pytest.raises(StoreBusy, match=r"being built by another.*\.lock"):  # noqa: SIM117
        with store.building(RECIPE):
            pass
    assert store.find(RECIPE) is not None


def test_the_lock_is_exclusive_under_contention(tmp_path: Path) -> None:
    """Many processes add to a number under the lock, whose file comes and goes."""
    script = """
import sys
from pathlib import Path
from scmini.errors import StoreBusy
from scmini.locks import locked
folder = Path(sys.argv[1])
done = 0
while done < 30:
    try:
        with locked(folder / "lock", "busy"):
            number = folder / "number"
            number.write_text(str(int(number.read_text()) + 1))
            done += 1
    except StoreBusy:
        pass
"""
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "120"


def test_asking_for_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    with locked(path, "busy"):
        assert is_locked(path)
    assert not is_locked(path)


@pytest.mark.parametrize("change", ["flip", "cut", "delete"])
def test_tampering_is_noticed(tmp_path: Path, change: str) -> None:
    store = Store(tmp_path)
    found = build(store, **{"a.txt": "hello", "b.txt": "world"})
    path = found.path / "b.txt"
    if change == "flip":
        path.write_text("World")
    elif change == "cut":
        path.write_text("wor")
    else:
        path.unlink()
    with pytest.raises(StoreDamaged, match=r"b\.txt"):
        store.verify(found)
    store.verify(found, ("a.txt",))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": {}}'])
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    found = build(store)
    (found.path / "manifest.json").write_text(text)
    with pytest.raises(StoreDamaged, match=r"manifest\.json: damaged"):
        store.find(RECIPE)
    (found.path / "manifest.json").unlink()
    with pytest.raises(StoreDamaged, match=r"manifest\.json: missing; scmini repair"):
        store.find(RECIPE)
    (found.path / "manifest.json").mkdir()
    with pytest.raises(StoreDamaged, match=r"manifest\.json: cannot be read .* scmini repair"):
        store.find(RECIPE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("files", value) for value in ([], None, {"a.txt": 3}, {"a.txt": {"bytes": "x"}})),
        *(("recipe", []), ("seconds", "soon"), ("seconds", None)),
    ],
)
def test_a_manifest_of_another_shape(tmp_path: Path, key: str, value: Any) -> None:
    store = Store(tmp_path)
    found = build(store)
    path = found.path / "manifest.json"
    path.write_text(json.dumps({**found.manifest, key: value}))
    with pytest.raises(StoreDamaged, match=r"manifest\.json: damaged; scmini repair"):
        store.find(RECIPE)


def test_differences_are_explained_field_by_field() -> None:
    new = replace(
        RECIPE,
        version=2,
        config={"dpo": {"beta": 0.2}, "seed": 1},
        sources={"data.path x": "9"},
        inputs={"sft": "3", "filter": "1"},
    )
    assert explain(RECIPE, new) == [
        "version of the stage: 1 -> 2",
        "dpo.beta: 0.1 -> 0.2",
        "seed: unset -> 1",
        "data.path x changed",
        "input sft changed",
        "input filter changed",
    ]
    assert explain(RECIPE, RECIPE) == []


def test_relatives_differ_in_the_filter_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    base = Recipe("reference", None, 1, {"model": {}}, {}, {"sft": "1", "filter": "1"})
    for other in (
        base,
        replace(base, inputs={"sft": "2", "filter": "1"}),
        replace(base, config={"model": {"x": 1}}),
        replace(base, method="m"),
    ):
        build(store, other)
    new = replace(base, inputs={"sft": "1", "filter": "2"})
    with store.building(new) as work:
        assert work is not None
        assert work.earlier == [tmp_path / base.folder]
    with store.building(new, force=True) as work:
        assert work is not None
        assert work.earlier == []
    (tmp_path / base.folder / "a.txt").write_text("other")
    with store.building(replace(new, inputs={"sft": "1", "filter": "3"})) as work:
        assert work is not None
        assert work.earlier == [tmp_path / new.folder], "a damaged one"


def test_recipes_with_equal_content_are_equal() -> None:
    one = replace(RECIPE, config={"a": 1, "b": 2.0})
    two = replace(RECIPE, config={"b": 2.0, "a": 1})
    assert one.folder == two.folder
    assert replace(one, method="dpo").folder != one.folder


def test_what_a_kill_left_beside_a_finished_stage_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = build(store)
    lock, old = store.lock(found.path.name), store.replaced(found.path.name)
    old.mkdir()
    with locked(lock, "held"):
        store.tidy(found)
        assert lock.exists()
        assert old.exists(), "somebody is at work"
    lock.touch()
    store.tidy(found)
    assert [path.name for path in tmp_path.iterdir()] == [found.path.name]
