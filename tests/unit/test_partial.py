"""What a resume takes over of a work folder: only what is as it was written."""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmini import partial
from scmini.errors import StoreDamaged
from scmini.store import Recipe, Store, Work, sealing, write_atomic

RECIPE = Recipe("sample", None, 1, {"sample": {"n": 2}})


def work_in(store: Store) -> Iterator[Work]:
    """A session that is killed: nothing of it is sealed."""
    with pytest.raises(KeyboardInterrupt), store.building(RECIPE) as work:  # noqa: PT012
        assert work is not None
        yield work
        raise KeyboardInterrupt


def begin(store: Store) -> Path:
    """Two shards and two checkpoints in a work folder, and a file that nobody sealed."""
    for work in work_in(store):
        for number in (0, 1):
            with sealing(work.path / f"part-{number}"):
                write_atomic(work.path / f"part-{number}", b"shard %d" % number)
            folder = work.path / f"checkpoint-{number}"
            with sealing(folder):
                folder.mkdir()
                for name in ("weights", "optimizer"):
                    (folder / name).write_text(f"{name} {number}")
        (work.path / "free").write_text("not sealed")
    return store.partial(RECIPE)


def units(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "log"}


WHOLE = {"part-0", "part-1", "checkpoint-0", "checkpoint-1", "free"}


def test_what_is_sound_stays(tmp_path: Path, capsys: Any) -> None:
    store = Store(tmp_path)
    folder = begin(store)
    for _ in work_in(store):
        assert units(folder) == WHOLE
    assert "made anew" not in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flip", "cut", "delete", "folder"])
@pytest.mark.parametrize("name", ["part-1", "checkpoint-1/optimizer"])
def test_what_is_damaged_goes(tmp_path: Path, capsys: Any, name: str, how: str) -> None:
    store = Store(tmp_path)
    path = begin(store) / name
    if how == "flip":
        path.write_text("other" + path.read_text()[5:])
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
    gone = name.partition("/")[0]
    for work in work_in(store):
        assert units(work.path) == WHOLE - {gone}
    whole_unit_gone = name == gone and how == "delete"
    assert (f"{gone}: changed" in capsys.readouterr().err) != whole_unit_gone


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of a sealed file it costs that unit; of the seals, at most one."""
    store = Store(tmp_path_factory.mktemp("store"))
    folder = begin(store)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "free")
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 9999)) % len(content)  # lengths differ, as times are in them
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    for work in work_in(store):
        lost = WHOLE - units(work.path)
        if "log" in path.relative_to(folder).parts:
            assert len(lost) <= 1
        else:
            assert lost == {path.relative_to(folder).parts[0]}


def test_a_unit_that_was_deleted_on_purpose(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shutil.rmtree(begin(store) / "checkpoint-0")
    for work in work_in(store):
        assert units(work.path) == WHOLE - {"checkpoint-0"}
        with sealing(work.path / "part-0"):
            write_atomic(work.path / "part-0", b"made anew, and otherwise")
    for work in work_in(store):
        assert (work.path / "part-0").read_bytes() == b"made anew, and otherwise"


def test_a_torn_seal(tmp_path: Path) -> None:
    """A kill while it was put down: whether the checkpoint is whole, nobody can say any more."""
    store = Store(tmp_path)
    seals = begin(store) / partial.SEALS
    seals.write_bytes(seals.read_bytes()[:-20])
    for work in work_in(store):
        assert units(work.path) == WHOLE - {"checkpoint-1"}
        with sealing(work.path / "part-1"):
            pass
        assert "part-1" in partial.noted(work.path), "what follows a torn line is read"


def test_a_kill_before_the_seal(tmp_path: Path) -> None:
    """A shard that was written, but not sealed, and damaged afterwards."""
    store = Store(tmp_path)
    begin(store)
    for work in work_in(store):
        with suppress(KeyboardInterrupt), sealing(work.path / "part-1"):
            write_atomic(work.path / "part-1", b"")
            raise KeyboardInterrupt
    for work in work_in(store):
        assert units(work.path) == WHOLE - {"part-1"}


def test_nothing_damaged_is_blessed(tmp_path: Path) -> None:
    """A shard that changed between its seal and the manifest."""
    store = Store(tmp_path)
    shard = begin(store) / "part-0"
    with pytest.raises(StoreDamaged, match=r"part-0: changed .* run again"), store.building(RECIPE):
        shard.write_text("shard 9")
    assert store.find(RECIPE) is None
    with store.building(RECIPE) as work:
        assert work is not None
        assert units(work.path) == WHOLE - {"part-0"}


def test_killed_between_the_manifest_and_the_name(tmp_path: Path) -> None:
    """What the manifest says counts for files that have no other seal, and for the time."""
    store = Store(tmp_path)
    begin(store)
    with store.building(RECIPE):
        pass
    found = store.find(RECIPE)
    assert found is not None
    seconds = {**found.manifest, "seconds": 70.0}
    (found.path / "manifest.json").write_text(json.dumps(seconds))
    (found.path / "free").write_text("damaged")
    found.path.rename(store.partial(RECIPE))
    with store.building(RECIPE) as work:
        assert work is not None
        assert units(work.path) == WHOLE - {"free"}
    again = store.find(RECIPE)
    assert again is not None
    assert 70 <= again.seconds < 80
    assert not list(again.path.rglob("sessions.json"))


@pytest.mark.parametrize(
    "text", ["", "[", "3", "[3]", "[[1]]", '[["x", null]]', '{"a": 1}', "[[1, 2, 3]]", "\x00"]
)
def test_damaged_sessions_and_seals(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    folder = begin(store)
    (folder / partial.SESSIONS).write_text(text)
    (folder / partial.SEALS).write_text(f'{text}\n{{"unit": 3, "files": {{"/etc": 1}}}}\n')
    with store.building(RECIPE) as work:
        assert work is not None
        assert units(work.path) == WHOLE
    found = store.find(RECIPE)
    assert found is not None
    assert found.seconds < 60


def test_outside_of_a_work_folder(tmp_path: Path) -> None:
    with sealing(tmp_path / "part-0"):
        (tmp_path / "part-0").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["part-0"]
