"""Stage `embed`: unit vectors of the targets and of all sampled answers, one shard in memory.

Beside the vectors of a shard, part-*.npy, lies part-*.ids.json: for each of its prompts in order
{"id", "rows": vectors it has, "empty": those that are zero, "long": texts longer than the encoder
reads at once}.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scmini.config import Config
from scmini.console import progress
from scmini.data.vectors import read_listed, read_vectors_shard
from scmini.errors import DataError
from scmini.models.encoders import Encoder, build_encoder
from scmini.models.hashed_ngrams import Vectors
from scmini.records import read_examples, read_samples_shard
from scmini.store import Work, sealing, write_atomic
from scmini.training.checkpoints import peak_gib

Prompts = list[tuple[str, list[str]]]
"""Id, and the target followed by the answers in order."""
_COUNTS = ("empty", "long")
_LONG = {
    "truncate": "texts cut at embed.max_length",
    "mean": "texts read in pieces of embed.max_length",
}


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Write part-*.npy (float16; per prompt its target, then its answers) with part-*.ids.json.

    A finished shard is not read again: what there is to count of it is in its .ids.json.

    Raises:
        DataError: a shard of answers is damaged or does not fit data/train.jsonl, or the encoder
            gives numbers that are not finite; what is finished stays.
    """
    shards = sorted(inputs["sample"].glob("part-*.parquet"))
    if not shards:
        raise DataError(f"{inputs['sample']}: there is no part-*.parquet")
    outputs = {shard: work.path / f"{shard.stem}.npy" for shard in shards}
    listed = {shard: _finished(output) for shard, output in outputs.items()}
    missing = [shard for shard, groups in listed.items() if groups is None]
    if missing:
        targets = {e.id: e.target for e in read_examples(inputs["data"] / "train.jsonl")}
        finished = sum(group["rows"] for groups in listed.values() for group in groups or [])
        meter = _Meter(finished, sum(map(_count_texts, missing)))
        encoder = build_encoder(config.embed)
        encoder.fit(_distinct_per_prompt(shards, targets), work.path / "scratch" / "rarity.npy")
        for shard in missing:
            prompts = _prompts(shard, targets)
            meter.begin(prompts)
            listed[shard] = _embed(shard, prompts, encoder, outputs[shard], meter.show)
    groups = [group for shard in shards for group in listed[shard] or []]
    _report(groups, config, work)
    work.note("dimensions", int(read_vectors_shard(outputs[shards[0]])[1].shape[1]))
    work.note("peak_gib", round(peak_gib(), 3))


def _finished(output: Path) -> list[dict[str, Any]] | None:
    """What lies beside the vectors of a shard, which are written last; None if it must be made."""
    try:
        if not output.exists():
            return None
        return read_listed(output.with_suffix(".ids.json"), _COUNTS)
    except (OSError, ValueError):
        return None


def _prompts(shard: Path, targets: dict[str, str]) -> Prompts:
    found: Prompts = []
    for number, row in enumerate(read_samples_shard(shard), start=1):
        if row.id not in targets:
            raise DataError(f"{shard}, row {number}: prompt {row.id!r} is not in data/train.jsonl")
        found.append((row.id, [targets[row.id], *(answer.text for answer in row.responses)]))
    return found


def _distinct_per_prompt(shards: list[Path], targets: dict[str, str]) -> Iterator[list[str]]:
    """By shard; an answer that is given often to one prompt does not make its words common ones."""
    for done, shard in enumerate(shards):
        progress(done, len(shards), "shards read")
        yield [text for _, texts in _prompts(shard, targets) for text in dict.fromkeys(texts)]
    progress(len(shards), len(shards), "shards read")


def _embed(
    shard: Path,
    prompts: Prompts,
    encoder: Encoder,
    output: Path,
    on_share: Callable[[float], None],
) -> list[dict[str, Any]]:
    """Encode each distinct text once and write the two files; returns what is in the .ids.json."""
    distinct = list(dict.fromkeys(text for _, texts in prompts for text in texts))
    place = {text: number for number, text in enumerate(distinct)}
    rows = np.array([place[text] for _, texts in prompts for text in texts], np.int64)
    vectors, long = encoder.encode(distinct, on_share)
    _check_finite(shard, prompts, vectors, rows)
    empty = ~np.asarray(vectors.any(axis=1))
    listed: list[dict[str, Any]] = []
    start = 0
    for id, texts in prompts:
        own = rows[start : start + len(texts)]
        counts = {"empty": int(empty[own].sum()), "long": int(long[own].sum())}
        listed.append({"id": id, "rows": len(texts), **counts})
        start += len(texts)
    halves = vectors.astype(np.float16)
    del vectors
    buffer = io.BytesIO()
    np.save(buffer, halves[rows], allow_pickle=False)
    lines = json.dumps(listed, ensure_ascii=False) + "\n"
    for path, data in (
        (output.with_suffix(".ids.json"), lines.encode()),
        (output, buffer.getvalue()),
    ):
        with sealing(path):
            write_atomic(path, data)
    return listed


def _check_finite(shard: Path, prompts: Prompts, vectors: Vectors, rows: NDArray[np.int64]) -> None:
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    broken = ~finite[rows]
    if not broken.any():
        return
    row = int(broken.argmax())
    for id, texts in prompts:
        if row < len(texts):
            which = f"response {row - 1}" if row else "the target"
            raise DataError(
                f"{shard}: prompt {id!r}, {which}: the encoder gave a vector that is not finite; "
                "set embed.dtype: float32, or take another embed.encoder"
            )
        row -= len(texts)


def _count_texts(shard: Path) -> int:
    """Targets and answers of a shard, from its footer alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(shard)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{shard}: not a readable Parquet file ({error})") from None
    answers = 0
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.startswith("responses.") and "text" in (
                column.path_in_schema.split(".")
            ):
                absent = column.statistics.null_count if column.statistics else 0
                answers += column.num_values - (absent or 0)  # prompts without answers count there
    return int(footer.num_rows + answers)


class _Meter:
    """Progress in texts, those of finished shards included."""

    def __init__(self, finished: int, missing: int) -> None:
        self._before, self._here = finished, 0
        self._total = finished + missing

    def begin(self, prompts: Prompts) -> None:
        """The next shard's turn."""
        self._before += self._here
        self._here = sum(len(texts) for _, texts in prompts)
        self.show(0.0)

    def show(self, share: float) -> None:
        """So much of the shard is done."""
        done = self._before + int(share * self._here)
        progress(min(done, self._total), self._total, "texts")


def _report(groups: list[dict[str, Any]], config: Config, work: Work) -> None:
    """Counts and notes of all shards."""
    texts, empty, long = (sum(group[key] for group in groups) for key in ("rows", "empty", "long"))
    if empty:
        work.count("empty texts (zero vector)", empty)
    if long:
        work.count(_LONG[config.embed.long_texts], long)
    work.note("texts", texts)
    work.note("long_share", round(long / texts, 4) if texts else 0.0)
