"""Cosines of all prompts from shards on disk: what runs in a process of its own.

The folder has what the stages before the filter leave: data/train.jsonl, sample/part-*.parquet,
embed/part-*.npy with their .ids.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from memory import Peak

from peers.names import OURS, READING, STAGE
from peers.similarities import SHARD_PROMPTS, Size, blocks, torch_blocks

ANSWER_CHARS, ANSWER_TOKENS = 200, 50

Later = Callable[[], Any]
"""Gives the cosines [prompts, answers], once the clock has stopped."""


def write_inputs(root: Path, size: Size) -> None:
    """Shards of vectors and of answers, with the prompts: texts are all different, and not long."""
    for name in ("data", "sample", "embed"):
        (root / name).mkdir()
    with open(root / "data" / "train.jsonl", "w", encoding="utf-8") as examples:
        for number, vectors in enumerate(blocks(size)):
            stem = f"part-{number:05d}"
            ids = [f"{number * SHARD_PROMPTS + place}" for place in range(len(vectors))]
            for id in ids:
                prompt = [{"role": "user", "content": _text(id, "prompt")}]
                row = {"id": id, "prompt": prompt, "target": _text(id, "target")}
                examples.write(json.dumps(row) + "\n")
            _write_answers(root / "sample" / f"{stem}.parquet", ids, size.answers)
            groups = [{"id": id, "rows": 1 + size.answers} for id in ids]
            (root / "embed" / f"{stem}.ids.json").write_text(json.dumps(groups), "utf-8")
            np.save(root / "embed" / f"{stem}.npy", vectors.reshape(-1, size.dimensions))


def disk_bytes(size: Size) -> int:
    """What `write_inputs` writes and the stage writes again, at most."""
    texts = size.prompts * (2 * size.answers + 4) * (2 * ANSWER_CHARS)
    return size.bytes + texts + 4 * size.dots * ANSWER_TOKENS


def _text(*names: object) -> str:
    words = " ".join(str(name) for name in names)
    return (words + " and so on" * (ANSWER_CHARS // 10))[:ANSWER_CHARS]


def _write_answers(path: Path, ids: list[str], answers: int) -> None:
    """As `records.write_samples` would, without a Python object per token."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = len(ids) * answers
    texts = [_text(id, number) for id in ids for number in range(answers)]
    places = np.arange(total + 1, dtype=np.int32) * ANSWER_TOKENS
    tokens = pa.ListArray.from_arrays(places, np.zeros(total * ANSWER_TOKENS, np.int32))
    names = ["text", "token_ids", "finish_reason"]
    responses = pa.StructArray.from_arrays([pa.array(texts), tokens, ["stop"] * total], names)
    starts = np.arange(len(ids) + 1, dtype=np.int32) * answers
    columns = {
        "id": ids,
        "prompt_token_ids": [[0]] * len(ids),
        "responses": pa.ListArray.from_arrays(starts, responses),
    }
    pq.write_table(pa.table(columns), path)


def stream(name: str, root: Path, out: Path, pipe: Connection) -> None:
    """One pass over the shards; what it took goes into the pipe, the cosines to out/cosines.npy."""
    if name in (OURS, STAGE):  # whose process has this in memory; it is not timed
        import scmini.stages.filter  # noqa: F401

    one_thread()
    work = STREAMS[name]
    disk, peak = _read_bytes(), Peak("cpu")
    wall, cpu = time.perf_counter(), time.process_time()
    later = work(root, out)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    result: dict[str, Any] = {"cpu_seconds": cpu, "wall_seconds": wall, "peak": peak.read()}
    result["disk_bytes"] = _read_bytes() - disk
    if later is not None:
        np.save(out / "cosines.npy", later())
    pipe.send(result)


def one_thread() -> None:
    """For every library here; FAISS and torch have threads of their own."""
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


def _ours(root: Path, out: Path) -> Later:
    """What the stage does with its vectors."""
    from scmini.stages.filter import stream_similarity

    found = [
        shard.cosines.reshape(len(shard.groups), -1) for shard in stream_similarity(root / "embed")
    ]
    return lambda: np.concatenate(found)


def _stage(root: Path, out: Path) -> Later:
    """Similarity, candidates, half of the answers as negatives, and every file it writes."""
    from scmini.config import Config
    from scmini.sections import DataConfig, SampleConfig
    from scmini.stages import filter
    from scmini.store import Work

    data = DataConfig(format="jsonl", path=str(root / "data" / "train.jsonl"))
    answers = next(_shards(root)).shape[1] - 1
    method = f"self-contrast-{max(1, answers // 2)}"
    config = Config(methods=[method], data=data, sample=SampleConfig(n=answers))
    inputs = {name: root / name for name in ("data", "sample", "embed")}
    filter.run(config, inputs, Work(out))
    return lambda: np.concatenate(list(_read_similarity(out / "similarity")))


def _read_similarity(folder: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("part-*.parquet")):
        lists = pq.read_table(path, columns=["similarity"]).column(0).combine_chunks()
        yield lists.flatten().to_numpy().reshape(len(lists), -1)


def _einsum(root: Path, out: Path) -> Later:
    found = [torch_blocks(vectors) for vectors in _shards(root)]
    return lambda: np.concatenate(found)


def _reading(root: Path, out: Path) -> None:
    for _ in _shards(root):
        pass


def _shards(root: Path) -> Iterator[Any]:
    """[prompts, 1 + answers, dimensions]; here all prompts have as many answers."""
    for path in sorted((root / "embed").glob("part-*.npy")):
        groups = json.loads(path.with_suffix(".ids.json").read_bytes())
        vectors = np.load(path, allow_pickle=False)
        yield vectors.reshape(len(groups), groups[0]["rows"], -1)


def _read_bytes() -> int:
    """What this process has read from the disk and not from the page cache."""
    for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no read_bytes")


STREAMS: dict[str, Callable[[Path, Path], Later | None]] = {
    OURS: _ours,
    STAGE: _stage,
    "torch einsum, shard by shard": _einsum,
    READING: _reading,
}
