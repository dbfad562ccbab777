"""What is kept of a damaged finished stage, and that it ends like one that was never damaged."""

import os
from pathlib import Path
from typing import Any

import pytest
from test_answering import Engine, plan

from scmini import partial, salvage
from scmini.models.answering import write_answers
from scmini.store import Finished, Recipe, Store, Work, digest_of, sealing, write_atomic

RECIPE = Recipe("sample", None, 1, {})


def answer(work: Work, engine: Engine | None) -> None:
    write_answers(plan(), work.path, work.path / "scratch", lambda left: engine or Engine())


def sampled(store: Store, engine: Engine | None = None) -> Finished:
    with store.building(RECIPE) as work:
        assert work is not None
        answer(work, engine)
        (work.path / "log" / "text.log").write_text("noise")
    found = store.find(RECIPE)
    assert found is not None
    return found


def aside(store: Store, found: Finished, *damaged: str, legible: bool = True) -> salvage.Outcome:
    to = found.path.with_name(f"{found.path.name}.damaged-1")
    manifest = found.manifest if legible else None
    work = store.partial_of(found.path.name)
    return salvage.set_aside(found.path, to, work, manifest, damaged)


@pytest.mark.parametrize("legible", [True, False])
def test_a_damaged_shard_costs_one_shard(tmp_path: Path, legible: bool) -> None:
    store = Store(tmp_path)
    found = sampled(store)
    path = found.path / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30] + b"x" * 30)
    damaged = [path.name]
    if not legible:
        (found.path / "manifest.json").write_text("{")
        damaged = ["manifest.json"]
    assert aside(store, found, *damaged, legible=legible) == "rest goes on"
    left = {p.name for p in tmp_path.glob("*.damaged-1/*")}
    assert left >= {path.name, *(["manifest.json"] if not legible else [])}
    assert store.find(RECIPE) is None
    engine = Engine()
    again = sampled(store, engine)
    assert engine.asked == ["p4", "p5", "p6", "p7"]
    assert digest_of(again.manifest) == digest_of(found.manifest)
    assert again.seconds >= found.seconds * legible
    store.verify(again)


def test_the_shard_size_of_a_salvaged_folder(tmp_path: Path) -> None:
    """It is known although the configuration says another one by now."""
    store = Store(tmp_path)
    found = sampled(store)
    (found.path / "part-00002.parquet").unlink()
    aside(store, found, "part-00002.parquet")
    engine = Engine()
    with store.building(RECIPE) as work:
        assert work is not None
        wanted = plan(shard_size=3)
        write_answers(wanted, work.path, work.path / "scratch", lambda left: engine)
    assert engine.asked == ["p8", "p9"]


@pytest.mark.parametrize("names", [["log/text.log"], ["checkpoint-2/optimizer", "log/text.log"]])
def test_what_nobody_needs_is_not_made_again(tmp_path: Path, names: list[str]) -> None:
    store = Store(tmp_path)
    with store.building(RECIPE) as work:
        assert work is not None
        (work.path / "checkpoint-2").mkdir()
        (work.path / "checkpoint-2" / "optimizer").write_text("moments")
        (work.path / "log" / "text.log").write_text("noise")
        write_atomic(work.path / "part-0", b"shard")
    found = store.find(RECIPE)
    assert found is not None
    assert aside(store, found, *names) == "not needed"
    again = store.find(RECIPE)
    assert again is not None
    store.verify(again)
    assert again.manifest["products"] == digest_of(again.manifest) == digest_of(found.manifest)
    assert {p.relative_to(found.path.with_name(f"{found.path.name}.damaged-1")).as_posix()
            for p in tmp_path.rglob("*.damaged-1/**/*") if p.is_file()} == set(names)  # fmt: skip


@pytest.mark.parametrize("why", ["stage", "work", "nothing"])
def test_as_a_whole(tmp_path: Path, why: str) -> None:
    """A stage that begins anew, one that is being replaced, one of which no shard is left."""
    recipe = Recipe("filter" if why == "stage" else "sample", None, 1, {})
    store = Store(tmp_path)
    with store.building(recipe) as work:
        assert work is not None
        for name in ("a", "b")[: 1 if why == "nothing" else 2]:
            write_atomic(work.path / name, b"whole")
    found = store.find(recipe)
    assert found is not None
    if why == "work":
        store.partial(recipe).mkdir()
    (found.path / "a").write_text("other")
    assert aside(store, found, "a") == "whole"
    assert not found.path.exists()
    assert (found.path.with_name(f"{found.path.name}.damaged-1") / "a").read_text() == "other"


@pytest.mark.parametrize("stop", range(4))
def test_killed_while_it_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Neither a damaged file nor a missing one passes for a finished stage."""
    store = Store(tmp_path)
    found = sampled(store)
    for name in ("part-00000.parquet", "part-00002.parquet"):
        (found.path / name).write_bytes(b"")
    calls, rename = 0, os.rename

    def killed(*paths: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        rename(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        try:
            aside(store, found, "part-00000.parquet", "part-00002.parquet")
        except KeyboardInterrupt:
            assert stop < 3
    left = store.find(RECIPE)
    if left is not None:
        lost = [n for n in left.manifest["files"] if not (left.path / n).is_file()]
        empty = [p.name for p in left.path.glob("part-*") if not p.stat().st_size]
        to = found.path.with_name(f"{found.path.name}.damaged-2")
        work = store.partial_of(found.path.name)
        salvage.set_aside(left.path, to, work, left.manifest, [*lost, *empty])
    assert digest_of(sampled(store).manifest) == digest_of(found.manifest)


def test_seals_outlive_the_sealing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.building(RECIPE) as work:
        assert work is not None
        with sealing(work.path / "part-0"):
            write_atomic(work.path / "part-0", b"shard")
    found = store.find(RECIPE)
    assert found is not None
    assert partial.noted(found.path)["part-0"] == found.manifest["files"]["part-0"]
