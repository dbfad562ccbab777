"""Shards, journal and resume of the stages that draw answers; the engine is plain Python."""

import errno
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmini import records
from scmini.errors import DataError, EnvironmentProblem
from scmini.models import answering
from scmini.models.answering import FINAL, TOO_LONG, Plan, write_answers
from scmini.models.sampler import Answered, Prompt
from scmini.records import Response, Samples, read_samples

ODD = "\u0000 \u202e 👩\u200d👩\u200d👧 \ud7ff\r\n\u2028"


class Engine:
    """Answers "<id> <i>" to each prompt; stops, or fails at prompts, as told."""

    def __init__(
        self,
        *,
        stop_after: int | None = None,
        failing: Iterable[str] = (),
        resumes_at: Literal["prompt", "shard"] = "prompt",
        order: int = 1,
    ) -> None:
        self.facts: dict[str, Any] = {"engine": "plain"}
        self.resumes_at: Literal["prompt", "shard"] = resumes_at
        self.stop_after, self.failing, self.order = stop_after, set(failing), order
        self.asked: list[str] = []
        self.closed = False

    def stream(self, shards: Iterable[list[Prompt]], n: int, seed: int) -> Iterator[Answered]:
        for shard in shards:
            for prompt in shard[:: self.order]:
                if self.stop_after == len(self.asked):
                    raise KeyboardInterrupt
                self.asked.append(prompt[0])
                if prompt[0] in self.failing:
                    yield Answered(prompt, [], "broke")
                else:
                    yield Answered(prompt, [answer(prompt[0], i) for i in range(n)])

    def close(self) -> None:
        self.closed = True


def answer(id: str, number: int) -> Response:
    return Response(f"{id} {number} {ODD}", [number, 1], "stop")


def plan(count: int = 10, **more: Any) -> Plan:
    prompts = [(f"p{i}", list(range(1 + i % 3))) for i in range(count)]
    given = {"n": 2, "seed": 0, "max_length": 8, "shard_size": 4, "max_failed_share": 0.0} | more
    return Plan(prompts=given.pop("prompts", prompts), **given)


def run(wanted: Plan, folder: Path, engine: Engine | None) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)

    def make(left: int) -> Engine:
        assert engine is not None, "nothing was to be asked"
        assert left > 0
        return engine

    return write_answers(wanted, folder, folder / "scratch", make)


def expected(wanted: Plan) -> list[Samples]:
    return [
        Samples(id, ids, [answer(id, i) for i in range(wanted.n)]) for id, ids in wanted.prompts
    ]


def test_all_answers_in_order(tmp_path: Path) -> None:
    engine = Engine(order=-1)
    assert run(plan(), tmp_path / "a", engine) == {"engine": "plain"}
    assert list(read_samples(tmp_path / "a")) == expected(plan())
    assert engine.closed
    assert run(plan(), tmp_path / "a", None) == {"engine": "plain"}  # of the earlier attempt


@settings(max_examples=60, deadline=None)
@given(
    stops=st.lists(st.integers(0, 11), max_size=6),
    order=st.sampled_from([1, -1]),
    resumes_at=st.sampled_from(["prompt", "shard"]),
)
def test_interruptions_lose_nothing(
    stops: list[int], order: int, resumes_at: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By prompt nothing is asked twice; by shard no more than the one that was begun."""
    folder, asked = tmp_path_factory.mktemp("answers"), Counter[str]()
    for stop in stops:
        engine = Engine(stop_after=stop, order=order, resumes_at=resumes_at)
        try:
            if len(list(folder.glob("part-*"))) < 3:
                run(plan(), folder, engine)
        except KeyboardInterrupt:
            assert engine.closed
        asked.update(engine.asked)
    if len(list(folder.glob("part-*"))) < 3:
        last = Engine(order=order, resumes_at=resumes_at)
        run(plan(), folder, last)
        asked.update(last.asked)
    assert list(read_samples(folder)) == expected(plan())
    assert set(asked) == {id for id, _ in plan().prompts}
    if resumes_at == "prompt":
        assert max(asked.values()) == 1


def test_a_torn_line_costs_one_prompt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(plan(), tmp_path, Engine(stop_after=3))
    journal = tmp_path / "scratch" / "answers.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    engine = Engine()
    run(plan(), tmp_path, engine)
    assert engine.asked == ["p2", *(f"p{i}" for i in range(3, 10))]
    assert list(read_samples(tmp_path)) == expected(plan())


def test_prompts_that_fail_are_recorded(tmp_path: Path) -> None:
    wanted = plan(max_failed_share=0.25)
    run(wanted, tmp_path, Engine(failing=["p1", "p9"]))
    rows = {row.id: row for row in read_samples(tmp_path)}
    assert len(rows) == 10
    for id, row in rows.items():
        failed = id in ("p1", "p9")
        assert (row.failure, len(row.responses)) == (("broke", 0) if failed else (None, 2))
    again = Engine()  # the next attempt asks them again, and nobody else
    run(wanted, tmp_path, again)
    assert again.asked == ["p1", "p9"]
    assert list(read_samples(tmp_path)) == expected(wanted)


def test_a_disk_that_is_full_ends_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    engine = Engine()
    monkeypatch.setattr(answering._Journal, "append", full)
    monkeypatch.setattr(answering._Journal, "sync", full)
    with pytest.raises(OSError, match="No space"):
        run(plan(), tmp_path, engine)
    assert engine.closed


def test_too_many_failures_stop_and_keep_the_rest(tmp_path: Path) -> None:
    wanted, failing = plan(max_failed_share=0.25), ["p1", "p2", "p5"]
    engine = Engine(failing=failing)
    with pytest.raises(EnvironmentProblem, match=r"3 of 10 prompts .* a share of 0\.25.* broke"):
        run(wanted, tmp_path, engine)
    assert engine.closed
    again = Engine()
    run(wanted, tmp_path, again)
    assert set(again.asked) == {f"p{i}" for i in range(10)} - {"p0", "p3", "p4"}
    assert list(read_samples(tmp_path)) == expected(wanted)


def test_prompts_that_are_too_long_are_not_asked(tmp_path: Path) -> None:
    wanted = plan(prompts=[("a", [1] * 8), ("b", [1] * 7), ("c", [1] * 9)], shard_size=1)
    engine = Engine()
    run(wanted, tmp_path, engine)
    assert engine.asked == ["b"]
    assert [row.failure for row in read_samples(tmp_path)] == [TOO_LONG, None, TOO_LONG]
    assert TOO_LONG in FINAL
    run(wanted, tmp_path, None)


def test_a_damaged_shard_is_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(plan(), tmp_path, Engine())
    shard = tmp_path / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    (tmp_path / "scratch" / "answers.jsonl").unlink()  # or its answers would come from there
    engine = Engine()
    run(plan(), tmp_path, engine)
    assert engine.asked == ["p4", "p5", "p6", "p7"]
    assert list(read_samples(tmp_path)) == expected(plan())
    assert "part-00001.parquet: not a readable Parquet file" in capsys.readouterr().err


@pytest.mark.parametrize("full", ["journal", "shard"])
def test_a_full_disk_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    writes = 0

    def write(*arguments: Any) -> None:
        nonlocal writes
        writes += 1
        if writes > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments)

    target: Any = (answering, "write_samples") if full == "shard" else (answering, "_line")
    original = getattr(*target)
    if full == "journal":

        def line(row: Samples) -> bytes:
            if row.id == "p5":
                raise OSError(errno.ENOSPC, "No space left on device")
            return bytes(original(row))

        monkeypatch.setattr(*target, line)
    else:
        monkeypatch.setattr(*target, write)
    with pytest.raises(OSError, match="No space"):
        run(plan(), tmp_path, Engine())
    assert [path.name for path in sorted(tmp_path.glob("part-*"))] == ["part-00000.parquet"]
    monkeypatch.undo()
    engine = Engine()
    run(plan(), tmp_path, engine)
    assert not {"p0", "p1", "p2", "p3", "p4"} & set(engine.asked)
    assert list(read_samples(tmp_path)) == expected(plan())


def test_the_journal_is_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering._Journal, "LARGE", 1)
    with pytest.raises(KeyboardInterrupt):
        run(plan(), tmp_path, Engine(stop_after=9))
    lines = (tmp_path / "scratch" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line.partition(" ")[2])["id"] for line in lines] == ["p8"]


def test_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompt"):
        run(plan(0), tmp_path, None)


def test_rows_without_an_id_or_text_are_named(tmp_path: Path) -> None:
    import pyarrow as pa

    rows = [{"id": "a", "prompt_token_ids": [1], "responses": [{"text": None}]}]
    records.write_table(tmp_path / "part-0.parquet", pa.Table.from_pylist(rows))
    with pytest.raises(DataError, match=r"part-0.parquet, line 1: column 'responses'"):
        list(read_samples(tmp_path))


def test_facts_outlive_a_kill_after_the_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to do then, and no engine is started."""

    def killed(journal: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answering._Journal, "sync", killed)
        with pytest.raises(KeyboardInterrupt):
            run(plan(), tmp_path, Engine())
    assert len(list(tmp_path.glob("part-*"))) == 3
    assert run(plan(), tmp_path, None) == {"engine": "plain"}
