"""Stage `filter`: how similar each answer is to its target, and which become whose negatives."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from scmini.config import Config, is_trained_by_dpo, num_negatives
from scmini.console import progress
from scmini.data import zoo
from scmini.data.selection import Answers, Candidates, candidates, draw, unfiltered, usable
from scmini.errors import DataError
from scmini.records import (
    Example,
    Pair,
    Samples,
    read_examples,
    read_samples,
    read_table,
    write_jsonl,
    write_table,
)
from scmini.stages.embed import read_vectors
from scmini.store import Work

NO_SIMILARITY = 0.0
"""Stands in pairs/dpo.jsonl: the data set's own rejected answers are not embedded."""
_GROUPS = 64
"""Prompts whose vectors are in one FAISS index at a time."""
_SPIN, _UNFILTERED, _FILTERED = "spin", "unfiltered", "filtered"

Prompts = Iterator[tuple[Example, Samples | None, list[float]]]
Draws = dict[str, list[int]]
"""By method, the indices of a prompt's negatives."""


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Write similarity/, pairs/<method>.jsonl for every method trained by DPO, and used.jsonl.

    Raises:
        DataError: files of the stages before do not fit together, or a method gets no pair at all.
    """
    examples = read_examples(inputs["data"] / "train.jsonl")
    methods = [method for method in config.methods if is_trained_by_dpo(method)]
    prompts: Prompts = ((example, None, []) for example in examples)
    total = len(examples)
    if "sample" in inputs:
        total = _write_similarity(inputs["embed"], work.path / "similarity")
        prompts = _answered(examples, inputs["sample"], work.path / "similarity")
    tally, used = _Tally(config), []
    with _PairFiles(work.path / "pairs", methods) as files:
        for done, (example, samples, similarity) in enumerate(prompts):
            progress(done, total, "prompts")
            answers = _answers(example, samples, similarity)
            draws = _draw(config, methods, example, answers, work)
            for method, indices in draws.items():
                pair = _pair(example, answers, indices)
                files.write(method, pair)
                tally.add(method, pair)
            if draws:
                indices = sorted({index for drawn in draws.values() for index in drawn})
                used.append({"id": example.id, "response_index": indices})
    tally.report(methods, work)
    write_jsonl(work.path / "used.jsonl", used)


def group_similarity(groups: list[int], vectors: NDArray[np.float16]) -> list[list[float]]:
    """Cosine of each group's first vector with each of its others, in float32 by FAISS.

    Args:
        groups: number of rows of each group; they follow one another in `vectors`.
        vectors: [rows, dimensions]; a zero vector has cosine 0 with all.
    """
    import faiss

    block = vectors.astype(np.float32)
    faiss.normalize_L2(block)  # their lengths are 1 only up to float16
    index: Any = faiss.IndexFlatIP(block.shape[1])
    index.add(block)
    starts = np.cumsum([0, *groups[:-1]])
    width = max(groups) - 1
    if width == 0:
        return [[] for _ in groups]
    labels = np.zeros((len(groups), width), np.int64)
    for number, (start, rows) in enumerate(zip(starts, groups, strict=True)):
        labels[number, : rows - 1] = np.arange(start + 1, start + rows)
    queries = np.ascontiguousarray(block[starts])
    cosines = np.empty(labels.shape, np.float32)
    at = faiss.swig_ptr
    index.compute_distance_subset(len(groups), at(queries), width, at(cosines), at(labels))
    return [row[: rows - 1].tolist() for row, rows in zip(cosines, groups, strict=True)]


def _write_similarity(embeddings: Path, folder: Path) -> int:
    """One file per shard of embeddings: id, similarity of each answer to the target.

    Returns:
        The number of prompts.
    """
    import pyarrow as pa

    prompts = 0
    schema = pa.schema([("id", pa.string()), ("similarity", pa.list_(pa.float32()))])
    for number, (groups, vectors) in enumerate(read_vectors(embeddings)):
        if not np.isfinite(vectors).all():
            raise DataError(f"{embeddings}: shard {number} holds vectors that are not finite")
        found, row = [], 0
        for start in range(0, len(groups), _GROUPS):
            sizes = [rows for _, rows in groups[start : start + _GROUPS]]
            found += group_similarity(sizes, vectors[row : row + sum(sizes)])
            row += sum(sizes)
        ids = [id for id, _ in groups]
        table = pa.table({"id": ids, "similarity": found}, schema=schema)
        write_table(folder / f"part-{number:05d}.parquet", table)
        prompts += len(groups)
    return prompts


def _answered(examples: list[Example], samples: Path, similarity: Path) -> Prompts:
    """Each sampled prompt with its answers and their similarities, in the order of the shards."""
    by_id = {example.id: example for example in examples}
    cosines = (
        (row["id"], row["similarity"])
        for path in sorted(similarity.glob("part-*.parquet"))
        for row in read_table(path).to_pylist()
    )
    for row, (id, values) in zip(read_samples(samples), cosines, strict=True):
        if row.id != id or len(values) != len(row.responses) or id not in by_id:
            raise DataError(
                f"{samples}: prompt {row.id!r} does not fit its embeddings or data/train.jsonl"
            )
        yield by_id[id], row, values


def _answers(example: Example, samples: Samples | None, similarity: list[float]) -> Answers:
    responses = samples.responses if samples else []
    return Answers(
        target=example.target,
        texts=[response.text for response in responses],
        finished=[response.finish_reason == "stop" for response in responses],
        similarity=similarity,
    )


def _rule(method: str) -> str:
    if method == "spin":
        return _SPIN
    return _UNFILTERED if method.endswith("-unfiltered") else _FILTERED


def _candidates(config: Config, rule: str, answers: Answers, k: int) -> Candidates:
    """Of `spin` any usable answer, as often as it was given; else DESIGN 5.6."""
    if rule == _SPIN:
        return usable(answers)
    if rule == _UNFILTERED:
        return unfiltered(answers)
    return candidates(answers, config.filter.mode, config.filter.keep_fraction, k)


def _draw(
    config: Config, methods: list[str], example: Example, answers: Answers, work: Work
) -> Draws:
    """The negatives of one prompt for each method that gets a pair from it; the rest is counted."""
    found: Draws = {}
    own = {method: k for method in methods if (k := num_negatives(method)) is not None}
    lacking = set()
    counted: dict[str, Candidates] = {}
    for method, k in own.items():
        rule = _rule(method)
        found_here = _candidates(config, rule, answers, k)
        counted[rule] = found_here
        drawn = draw(found_here.kept, k, config.seed, example.id, len(answers.texts))
        if len(drawn) == k or (drawn and config.filter.allow_fewer):
            found[method] = drawn
        else:
            lacking.add(method)
            work.count(f"{method}: prompts with too few candidates")
    for rule, result in counted.items():
        for reason, number in result.dropped.items():
            work.count(f"{rule} answers: {reason}", number)
    if config.filter.common_subset and lacking:
        for method in found:
            work.count(f"{method}: prompts outside the common subset")
        found = {}
    if "dpo" in methods:
        if example.rejected:
            found["dpo"] = [-2 - number for number in range(len(example.rejected))]
        else:
            work.count("dpo: prompts without a rejected answer")
    return found


def _pair(example: Example, answers: Answers, indices: list[int]) -> Pair:
    """Indices from 0 are answers, those from -2 down the data set's own rejected ones."""
    return Pair(
        id=example.id,
        prompt=example.prompt,
        chosen=example.target,
        rejected=[answers.texts[i] if i >= 0 else example.rejected[-2 - i] for i in indices],
        similarity=[answers.similarity[i] if i >= 0 else NO_SIMILARITY for i in indices],
        response_index=indices,
    )


class _PairFiles:
    """pairs/<method>.jsonl, written side by side, each renamed into place when all is written."""

    def __init__(self, folder: Path, methods: list[str]) -> None:
        folder.mkdir(exist_ok=True)
        self._paths = {method: folder / f"{method}.jsonl" for method in methods}
        self._handles: dict[str, TextIO] = {}

    def __enter__(self) -> "_PairFiles":
        for method, path in self._paths.items():
            torn = path.with_name(f".{path.name}.tmp")
            self._handles[method] = open(torn, "w", encoding="utf-8", newline="\n")
        return self

    def write(self, method: str, pair: Pair) -> None:
        line = json.dumps(asdict(pair), ensure_ascii=False, allow_nan=False)
        self._handles[method].write(line + "\n")

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for method, handle in self._handles.items():
            with handle:
                handle.flush()
                os.fsync(handle.fileno())
            if kind is None:
                os.replace(handle.name, self._paths[method])


class _Tally:
    """Pairs, negatives and (in the demo) perfect answers among these, by method."""

    def __init__(self, config: Config) -> None:
        self._graded = config.data.format == "zoo"
        self._pairs: Counter[str] = Counter()
        self._negatives: Counter[str] = Counter()
        self._perfect: Counter[str] = Counter()

    def add(self, method: str, pair: Pair) -> None:
        self._pairs[method] += 1
        self._negatives[method] += len(pair.rejected)
        if self._graded:
            question = pair.prompt[-1]["content"]
            self._perfect[method] += sum(zoo.grade(question, text) == 1.0 for text in pair.rejected)

    def report(self, methods: list[str], work: Work) -> None:
        """Notes of the manifest; `DataError` for a method without any pair."""
        for method in methods:
            if not self._pairs[method]:
                raise DataError(_no_pairs(method, work.counts))
        work.note("prompts", {method: self._pairs[method] for method in methods})
        work.note(
            "effective_k",
            {method: round(self._negatives[method] / self._pairs[method], 4) for method in methods},
        )
        if self._graded:
            shares = {m: round(self._perfect[m] / self._negatives[m], 4) for m in methods}
            work.note("perfect_share", shares)


def _no_pairs(method: str, counts: Counter[str]) -> str:
    if method == "dpo":
        return "method dpo: no training row has a rejected answer; leave dpo out of methods"
    why = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
    return (
        f"method {method}: no prompt has enough candidates ({why}); raise sample.n, set "
        "filter.allow_fewer: true, or choose a smaller K"
    )
