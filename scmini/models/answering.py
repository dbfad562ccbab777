"""Answers to many prompts, in shards, so that a kill at any moment costs next to nothing.

    part-00000.parquet       a shard: so many prompts in the order of the file, written when all of
                             them are answered
    log/shard_size           as the folder was begun; a resume goes on with it
    log/engine.json          facts about the engine
    scratch/answers.jsonl    answers to prompts of shards that are not full yet, as they come: a
                             checksum and a line of JSON each

The engine gets prompts of the next shards before the current one is full, so that it is never
waiting. A prompt that failed is asked again by the next run.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scmini.console import progress, warn
from scmini.errors import DataError, EnvironmentProblem
from scmini.models.sampler import Answered, Prompt, Sampler
from scmini.records import Response, Samples, read_samples_shard, read_table, write_samples
from scmini.store import sealing, write_atomic

TOO_LONG = "prompt leaves no room for an answer"
NONE_GIVEN = "prompts to which the data set has no answer"
FINAL = (TOO_LONG, NONE_GIVEN)
"""Why a prompt has no answer, if no engine is to blame."""
_SYNC_SECONDS = 2.0


@dataclass(frozen=True)
class Plan:
    """What is to be answered.

    `prompts` are (id, token ids) in order; `max_length` bounds a prompt with its answer;
    `shard_size` is in prompts; more than `max_failed_share` of failed prompts is an error.
    """

    prompts: list[Prompt]
    n: int
    seed: int
    max_length: int
    shard_size: int
    max_failed_share: float


def write_answers(
    plan: Plan, folder: Path, scratch: Path, sampler: Callable[[int], Sampler]
) -> dict[str, Any]:
    """Answer what is not answered yet, into folder/part-*.parquet.

    Args:
        scratch: folder for what is under way.
        sampler: makes the engine, told how many prompts are left; called if there are any.

    Returns:
        Facts about the engine, those of earlier attempts where nothing was left to do.

    Raises:
        EnvironmentProblem: too many prompts failed. Those that did not are kept.
    """
    if not plan.prompts:
        raise DataError("there is no prompt to answer")
    scratch.mkdir(exist_ok=True)
    work = _Answering(plan, folder, scratch)
    facts = folder / "log" / "engine.json"
    if work.num_left:
        engine = sampler(work.num_left)
        try:
            _put_down(facts, engine.facts)  # now: a kill may leave nothing to do but this
            shards = work.questions(whole=engine.resumes_at == "shard")
            for answered in engine.stream(shards, plan.n, plan.seed):
                work.take(answered)
        finally:
            try:
                work.journal.sync()
            finally:  # on a full disk, too
                engine.close()
        _put_down(facts, engine.facts)
    return dict(json.loads(facts.read_bytes())) if facts.exists() else {}


def _put_down(path: Path, facts: dict[str, Any]) -> None:
    with sealing(path):
        write_atomic(path, json.dumps(facts).encode())


class _Answering:
    """The shards that are not full yet, and what is known of them."""

    def __init__(self, plan: Plan, folder: Path, scratch: Path) -> None:
        size = _begun_with(folder / "log" / "shard_size", plan.shard_size)
        starts = range(0, len(plan.prompts), size)
        self._plan = plan
        self._shards = [plan.prompts[start : start + size] for start in starts]
        self._paths = [folder / f"part-{number:05d}.parquet" for number in range(len(starts))]
        self._shard_of = {id: k for k, shard in enumerate(self._shards) for id, _ in shard}
        for stale in set(folder.glob("part-*.parquet")) - set(self._paths):
            stale.unlink()
        self._open: dict[int, dict[str, Samples]] = {}
        for k, path in enumerate(self._paths):
            if (rows := _rows_to_take_over(path, self._shards[k])) is not None:
                self._open[k] = {row.id: row for row in rows}
        self.journal = _Journal(scratch / "answers.jsonl")
        for row in self.journal.rows():
            if (k := self._shard_of.get(row.id, -1)) in self._open:
                self._open[k][row.id] = row
        self._rewrite_journal()
        for k in self._open:
            self._paths[k].unlink(missing_ok=True)  # its good rows are in the journal
        self._failed, self._journals = 0, True
        self._close_those_without_questions()

    @property
    def num_left(self) -> int:
        """Prompts without an answer."""
        return sum(len(self._shards[k]) - len(rows) for k, rows in self._open.items())

    def questions(self, *, whole: bool) -> Iterator[list[Prompt]]:
        """By shard, the prompts without an answer; `whole` forgets the answers of begun shards."""
        if whole:
            for k, rows in self._open.items():
                self._open[k] = {id: row for id, row in rows.items() if row.failure in FINAL}
            self.journal.rewrite([])
        self._journals = not whole
        self._meter = _Meter(self._plan, len(self._plan.prompts) - self.num_left)
        for k in list(self._open):
            yield [prompt for prompt in self._shards[k] if prompt[0] not in self._open[k]]

    def take(self, answered: Answered) -> None:
        """Keep what came, and write the shard that it fills."""
        id, ids = answered.prompt
        row = Samples(id, ids, answered.responses, answered.failure)
        if row.failure is None and self._journals:
            self.journal.append(row)
        elif row.failure not in (None, *FINAL):
            self._fail(row.failure)
        k = self._shard_of[id]
        self._open[k][id] = row
        self._meter.add(row)
        self._close_if_full(k)

    def _fail(self, reason: str) -> None:
        self._failed += 1
        if self._failed > self._plan.max_failed_share * len(self._plan.prompts):
            raise EnvironmentProblem(
                f"{self._failed} of {len(self._plan.prompts)} prompts could not be answered, more "
                f"than a share of {self._plan.max_failed_share:g}; the last one: {reason}"
            )

    def _close_those_without_questions(self) -> None:
        for k in list(self._open):
            for id, ids in self._shards[k]:
                if len(ids) >= self._plan.max_length:
                    self._open[k][id] = Samples(id, ids, [], TOO_LONG)
            self._close_if_full(k)

    def _close_if_full(self, k: int) -> None:
        rows = self._open[k]
        if len(rows) == len(self._shards[k]):
            with sealing(self._paths[k]):
                write_samples(self._paths[k], [rows[id] for id, _ in self._shards[k]])
            del self._open[k]
            if self.journal.is_large:
                self._rewrite_journal()

    def _rewrite_journal(self) -> None:
        self.journal.rewrite(row for rows in self._open.values() for row in rows.values())


def _begun_with(path: Path, size: int) -> int:
    """The shard size that the folder was begun with."""
    if path.exists():
        return int(path.read_bytes())
    path.parent.mkdir(exist_ok=True)
    with sealing(path):
        write_atomic(path, str(size).encode())
    return size


def _rows_to_take_over(path: Path, prompts: list[Prompt]) -> list[Samples] | None:
    """None if the shard is full; else its answers, without those of prompts to be asked again."""
    if not path.exists():
        return []
    try:
        rows = read_table(path, columns=["id", "failure"]).to_pylist()
        if [row["id"] for row in rows] != [id for id, _ in prompts]:
            return []  # of a folder that was begun otherwise
        if all(row["failure"] in (None, *FINAL) for row in rows):
            return None
        return [row for row in read_samples_shard(path) if row.failure is None]
    except DataError as error:
        warn(f"{error}; it is made anew")
        return []


class _Journal:
    """Answers one by one; what a kill tears off is at most the end."""

    LARGE = 256 << 20

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: BinaryIO | None = None
        self._synced = time.monotonic()

    @property
    def is_large(self) -> bool:
        """Worth writing anew without what is in shards by now."""
        return self._path.stat().st_size > self.LARGE

    def rows(self) -> Iterator[Samples]:
        """What is there, without lines that are torn or not as they were written."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as lines:
            for line in lines:
                checksum, _, value = line.removesuffix(b"\n").partition(b" ")
                if checksum == _checksum(value):
                    row = json.loads(value)
                    responses = [Response(*response) for response in row["responses"]]
                    yield Samples(row["id"], row["prompt_token_ids"], responses)

    def rewrite(self, rows: Iterable[Samples]) -> None:
        """Replace all there is by these rows (those with a failure are left out)."""
        if self._handle is not None:
            self._handle.close()
        lines = (_line(row) for row in rows if row.failure is None)
        write_atomic(self._path, b"".join(lines))
        self._handle = open(self._path, "ab")  # noqa: SIM115 (open as long as the stage works)

    def append(self, row: Samples) -> None:
        """Add a row; it is on disk within two seconds if rows keep coming."""
        assert self._handle is not None
        self._handle.write(_line(row))
        self._handle.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have all rows on disk."""
        assert self._handle is not None
        os.fsync(self._handle.fileno())
        self._synced = time.monotonic()


def _line(row: Samples) -> bytes:
    responses = [[r.text, r.token_ids, r.finish_reason] for r in row.responses]
    value = {"id": row.id, "prompt_token_ids": row.prompt_token_ids, "responses": responses}
    text = json.dumps(value).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


class _Meter:
    """Progress in answers, with the tokens per second of this process's own work."""

    def __init__(self, plan: Plan, known: int) -> None:
        self._n = plan.n
        self._done, self._total = known * plan.n, len(plan.prompts) * plan.n
        self._tokens, self._start = 0, time.perf_counter()
        progress(self._done, self._total, "answers")

    def add(self, row: Samples) -> None:
        self._done += self._n
        self._tokens += sum(len(response.token_ids) for response in row.responses)
        seconds = max(time.perf_counter() - self._start, 1e-9)
        progress(self._done, self._total, "answers", **{"tokens/s": round(self._tokens / seconds)})
