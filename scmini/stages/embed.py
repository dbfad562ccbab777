"""Stage `embed`: unit vectors of the targets and of all sampled answers, one shard in memory."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scmini.config import Config
from scmini.console import progress
from scmini.errors import DataError
from scmini.models.encoders import Encoder, build_encoder
from scmini.records import read_examples, read_table
from scmini.store import Work, write_atomic
from scmini.training.checkpoints import peak_gib

Texts = dict[str, list[str]]
"""By prompt id: the target, then the answers in order."""


def run(config: Config, inputs: dict[str, Path], work: Work) -> None:
    """Write part-*.npy (float16; per prompt its target, then its answers) with part-*.ids.json."""
    targets = {e.id: e.target for e in read_examples(inputs["data"] / "train.jsonl")}
    shards = sorted(inputs["sample"].glob("part-*.parquet"))
    encoder = build_encoder(config.embed)
    encoder.fit(_distinct_per_prompt(shard, targets) for shard in shards)
    for done, shard in enumerate(shards):
        progress(done, len(shards), "shards")
        texts = _texts(shard, targets)
        everything = [text for group in texts.values() for text in group]
        if empty := sum(not text.strip() for text in everything):
            work.count("empty texts (zero vector)", empty)
        if cut := encoder.count_truncated(everything):
            work.count("texts cut at embed.max_length", cut)
        out = work.path / f"{shard.stem}.npy"
        if not out.exists():
            _write(out, texts, encoder)
    progress(len(shards), len(shards), "shards")
    work.note("dimensions", encoder.dimensions)
    work.note("peak_gib", round(peak_gib(), 3))


def _texts(shard: Path, targets: dict[str, str]) -> Texts:
    found: Texts = {}
    rows: list[dict[str, Any]] = read_table(shard).select(["id", "responses"]).to_pylist()
    for row in rows:
        if row["id"] not in targets:
            raise DataError(f"{shard}: prompt {row['id']!r} is not in data/train.jsonl")
        found[row["id"]] = [targets[row["id"]], *(r["text"] for r in row["responses"])]
    return found


def _distinct_per_prompt(shard: Path, targets: dict[str, str]) -> list[str]:
    """An answer that is given often to one prompt does not make its words common ones."""
    return [text for group in _texts(shard, targets).values() for text in dict.fromkeys(group)]


def _write(out: Path, texts: Texts, encoder: Encoder) -> None:
    """Encode each distinct text once; where the vectors, written last, are, all is there."""
    distinct = dict.fromkeys(text for group in texts.values() for text in group)
    place = {text: number for number, text in enumerate(distinct)}
    vectors = encoder.encode(list(distinct)).astype(np.float16)
    rows = [place[text] for group in texts.values() for text in group]
    ids = [{"id": id, "rows": len(group)} for id, group in texts.items()]
    lines = json.dumps(ids, ensure_ascii=False) + "\n"
    write_atomic(out.with_suffix(".ids.json"), lines.encode())
    buffer = io.BytesIO()
    np.save(buffer, vectors[rows], allow_pickle=False)
    write_atomic(out, buffer.getvalue())


def read_vectors(folder: Path) -> Iterator[tuple[list[tuple[str, int]], Any]]:
    """By shard: (id, rows) of its prompts in order, and the vectors [rows, dimensions] float16.

    Raises:
        DataError: a file is damaged, or the two files of a shard do not fit together.
    """
    for path in sorted(folder.glob("part-*.npy")):
        try:
            listed = json.loads(path.with_suffix(".ids.json").read_bytes())
            groups = [(group["id"], group["rows"]) for group in listed]
            vectors = np.load(path, allow_pickle=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not readable ({error})") from None
        if sum(rows for _, rows in groups) != len(vectors):
            raise DataError(f"{path}: {len(vectors)} vectors do not fit its .ids.json")
        yield groups, vectors
