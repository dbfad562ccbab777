"""Stage `filter`: how similar each answer is to its target, and which become whose negatives.

One pass over the shards of answers and embeddings, with data/train.jsonl walked beside them (its
prompts are in the same order): of each of the three no more than one shard is in memory.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from scmini import console
from scmini.config import Config, methods_with_pairs
from scmini.data.answers import Answered, read_answers
from scmini.data.negatives import NO_SIMILARITY, Chooser
from scmini.data.selection import Answers
from scmini.data.similarity import NotFinite, cosines
from scmini.data.vectors import read_vectors_shard
from scmini.errors import DataError
from scmini.records import Example, Pair, stream_examples, write_table
from scmini.store import Work

_USED = "used"


@dataclass(frozen=True)
class Measured:
    """One shard of embeddings, part-*.npy, with its cosines."""

    path: Path
    groups: list[tuple[str, int]]
    """Id and number of vectors (its target's and its answers') of each prompt, in order."""
    vectors: NDArray[np.float16]
    """[vectors of all prompts, dimensions]."""
    cosines: NDArray[np.float32]
    """[answers of all prompts], each to its own target."""


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Write similarity/part-*.parquet, pairs/<method>.jsonl and used.jsonl.

    A row of similarity/ is a prompt: its id, the similarity of each of its answers to the target,
    and in `dropped` why an answer is no candidate under the section `filter` (null: it is one).
    Pairs are written for every method trained by DPO; used.jsonl lists the answers that some
    method draws. All of it comes out the same, byte by byte, when the stage is run again. A later
    round of SPIN has no embeddings, and so no similarity/.

    Raises:
        DataError: files of the stages before do not fit together or are damaged, a vector is not
            finite, or a method gets no pair at all.
    """
    examples = stream_examples(inputs["data"] / "train.jsonl")
    methods = methods_with_pairs(config, work.method)
    paths = {method: work.path / "pairs" / f"{method}.jsonl" for method in methods}
    with _Lines(paths | {_USED: work.path / "used.jsonl"}) as lines:
        chooser = Chooser(config, methods, work)
        shards = _shards(inputs) if "embed" in inputs else []
        for done, (path, vectors) in enumerate(shards, start=1):
            _choose_in_shard(path, vectors, examples, chooser, lines, work)
            console.progress(done, len(shards), "shards")
        if "embed" not in inputs:
            for example, answers in _without_vectors(inputs, examples, work):
                _write_pairs(lines, chooser.choose(example, answers)[1])
        account = chooser.report()
    for line in account.splitlines():
        console.say(line)


def _without_vectors(
    inputs: dict[str, Path], examples: Iterator[Example], work: Work
) -> Iterator[tuple[Example, Answers]]:
    """Each prompt with its answers, if the model gave any: of what needs no similarity."""
    if "sample" not in inputs:
        for example in examples:
            yield example, Answers(example.target, [], [], [])
        return
    for path in sorted(inputs["sample"].glob("part-*.parquet")):
        for number, row in enumerate(read_answers(path), start=1):
            if not row.texts:
                work.count(f"prompts without answers: {_failure(row)}")
            example = _example(row, path, number, examples, work)
            unknown = [NO_SIMILARITY] * len(row.texts)
            yield example, Answers(example.target, row.texts, row.finished, unknown)


def stream_similarity(embeddings: Path) -> Iterator[Measured]:
    """Every shard of a folder of embeddings with its cosines, one in memory at a time.

    Raises:
        DataError: a shard is damaged, or a vector is not finite; names file, prompt and row.
    """
    for path in sorted(embeddings.glob("part-*.npy")):
        yield _measured(path)


def _measured(path: Path) -> Measured:
    groups, vectors = read_vectors_shard(path)
    rows = [number for _, number in groups]
    if min(rows, default=1) < 1:
        raise DataError(f"{path}: prompt {groups[rows.index(min(rows))][0]!r} has no target")
    try:
        return Measured(path, groups, vectors, cosines(rows, vectors))
    except NotFinite as error:
        raise DataError(_not_finite(path, groups, error.row)) from None


def _not_finite(path: Path, groups: list[tuple[str, int]], row: int) -> str:
    ends = np.cumsum([rows for _, rows in groups])
    prompt = int(np.searchsorted(ends, row, side="right"))
    id, rows = groups[prompt]
    answer = row - (int(ends[prompt]) - rows)
    whose = f"answer {answer}" if answer else "the target"
    return (
        f"{path}, row {row}: the vector of {whose} of prompt {id!r} is not finite; check "
        "embed.encoder and embed.dtype, then run again with --from embed --force"
    )


def _shards(inputs: dict[str, Path]) -> list[tuple[Path, Path]]:
    """Each shard of answers with its shard of embeddings."""
    answers = {path.stem: path for path in sorted(inputs["sample"].glob("part-*.parquet"))}
    vectors = {path.stem: path for path in inputs["embed"].glob("part-*.npy")}
    for stem, path in answers.items():
        if stem not in vectors:
            raise DataError(f"{inputs['embed']}: the vectors of {path} are missing; embed again")
    for stem, path in sorted(vectors.items()):
        if stem not in answers:
            raise DataError(f"{path}: there are no answers of this shard in {inputs['sample']}")
    return [(path, vectors[stem]) for stem, path in answers.items()]


def _choose_in_shard(
    path: Path,
    vectors: Path,
    examples: Iterator[Example],
    chooser: Chooser,
    lines: "_Lines",
    work: Work,
) -> None:
    shard, reasons = _measured(vectors), []
    for example, answers in _joined(path, shard, examples, work):
        candidates, pairs = chooser.choose(example, answers)
        _write_pairs(lines, pairs)
        reasons.append(candidates.reasons)
    _write_similarity(work.path / "similarity" / path.name, shard, reasons)


def _joined(
    path: Path, shard: Measured, examples: Iterator[Example], work: Work
) -> Iterator[tuple[Example, Answers]]:
    """Each prompt of a shard of answers with its answers and their similarities."""
    answered = read_answers(path)
    if len(answered) != len(shard.groups):
        raise DataError(
            f"{shard.path}: vectors of {len(shard.groups)} prompts do not fit the {len(answered)} "
            f"of {path}; embed again"
        )
    similarity, start = shard.cosines.tolist(), 0
    for number, (row, (id, vectors)) in enumerate(zip(answered, shard.groups, strict=True)):
        if row.id != id or vectors != 1 + len(row.texts):
            raise DataError(
                f"{path}, row {number + 1}: prompt {row.id!r} with {len(row.texts)} answers does "
                f"not fit its embeddings ({id!r}, {vectors} vectors) in {shard.path}; embed again"
            )
        if not row.texts:
            work.count(f"prompts without answers: {_failure(row)}")
        end = start + len(row.texts)
        first = start + number + 1  # in `vectors`: every prompt so far has its target there too
        found = shard.vectors[first : first + len(row.texts)]
        example = _example(row, path, number + 1, examples, work)
        yield (
            example,
            Answers(example.target, row.texts, row.finished, similarity[start:end], found),
        )
        start = end


def _failure(row: Answered) -> str:
    lines = (row.failure or "").strip().splitlines()
    return lines[0][:100] if lines else "no reason recorded"


def _example(
    row: Answered, path: Path, number: int, examples: Iterator[Example], work: Work
) -> Example:
    """The row of train.jsonl: the answers follow its order, but may leave some prompts out."""
    for example in examples:
        if example.id == row.id:
            return example
        work.count("prompts without answers: not sampled")
    raise DataError(
        f"{path}, row {number}: prompt {row.id!r} is not in data/train.jsonl, or not in its order; "
        "run again with --from sample --force"
    )


def _write_pairs(lines: "_Lines", pairs: dict[str, Pair]) -> None:
    for method, pair in pairs.items():
        lines.write(method, vars(pair))
    if pairs:
        indices = sorted({index for pair in pairs.values() for index in pair.response_index})
        id = next(iter(pairs.values())).id
        lines.write(_USED, {"id": id, "response_index": indices})


def _write_similarity(path: Path, shard: Measured, reasons: list[list[str | None]]) -> None:
    import pyarrow as pa

    starts = np.cumsum([0, *(number - 1 for _, number in shard.groups)]).astype(np.int32)
    flat = pa.array([reason for prompt in reasons for reason in prompt], pa.string())
    columns = {
        "id": pa.array([id for id, _ in shard.groups], pa.string()),
        "similarity": pa.ListArray.from_arrays(starts, pa.array(shard.cosines, pa.float32())),
        "dropped": pa.ListArray.from_arrays(starts, flat),
    }
    write_table(path, pa.table(columns))


class _Lines:
    """Files of JSON lines, written side by side and renamed into place when all are written.

    When the work ends in an error nothing stays of them, not even on a full disk.
    """

    def __init__(self, paths: dict[str, Path]) -> None:
        self._paths = paths
        self._handles: dict[str, TextIO] = {}

    def __enter__(self) -> "_Lines":
        for key, path in self._paths.items():
            path.parent.mkdir(exist_ok=True)
            torn = path.with_name(f".{path.name}.tmp")
            self._handles[key] = open(torn, "w", encoding="utf-8", newline="\n")
        return self

    def write(self, key: str, row: dict[str, Any]) -> None:
        self._handles[key].write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                for handle in self._handles.values():
                    handle.flush()
                    os.fsync(handle.fileno())
                for key, handle in self._handles.items():
                    handle.close()
                    os.replace(handle.name, self._paths[key])
        finally:
            for handle in self._handles.values():
                with suppress(OSError):  # what could not be written cannot be flushed either
                    handle.close()
                Path(handle.name).unlink(missing_ok=True)
