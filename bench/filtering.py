"""The filter benchmark: cosine of each answer with its own target, in memory and from shards.

In memory all peers get the same float16 vectors and take turns, round after round, in one process.
From shards each has a process of its own, whose resident memory is measured whole, libraries
included. All must agree with float64 before anything is timed.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rows
from memory import Peak
from peers import similarities
from peers.names import READING, STAGE
from peers.similarities import Cosines, Size
from peers.streams import STREAMS, disk_bytes, one_thread, stream, write_inputs

IN_MEMORY_PROMPTS = 8_000
PROMPTS = 200_000
ERROR = 1e-3
"""How far a cosine may be from float64's of the same float16 vectors."""
SPARE_BYTES = 2 << 30
_CHECKED_SHARDS = 3


class Disagreement(SystemExit):
    """A peer computes something else."""


@dataclass(frozen=True)
class Sample:
    """One pass over all vectors."""

    cpu_seconds: float
    wall_seconds: float
    peak: dict[str, int]
    disk_bytes: int = 0


def missing_disk(size: Size, folder: Path) -> str | None:
    """Why the shards do not fit into a folder; None if they do."""
    free, wanted = shutil.disk_usage(folder).free, disk_bytes(size) + SPARE_BYTES
    if free >= wanted:
        return None
    return (
        f"{folder}: {wanted / 1e9:.1f} GB of vectors and texts do not fit into the "
        f"{free / 1e9:.1f} GB that are free; take fewer --prompts, or another folder by TMPDIR"
    )


def measure(
    size: Size, device: str, rounds: int, *, in_memory_prompts: int = IN_MEMORY_PROMPTS
) -> Iterator[list[rows.Row]]:
    """Rows of the part that fits into memory, then those of all prompts from shards.

    Args:
        device: names the machine; the work is done by its processor.
        rounds: measured passes of each peer.

    Raises:
        Disagreement: a peer is further from float64 than rounding explains.
    """
    one_thread()
    head = {"what": "filter", **rows.header(device, rows.new_run()), "dtype": "float16"}
    head["ceilings"] = rows.ceilings("cpu")
    part = Size(min(size.prompts, in_memory_prompts), size.answers, size.dimensions)
    rows.say(f"filter: {part.prompts:,} prompts x {part.answers} in memory")
    yield _in_memory(head, part, rounds)
    rows.say(f"filter: {size.prompts:,} prompts x {size.answers}, {size.bytes / 1e9:.1f} GB")
    yield _from_shards(head, size, rounds)


def _in_memory(head: rows.Row, size: Size, rounds: int) -> list[rows.Row]:
    vectors = np.concatenate(list(similarities.blocks(size)))
    exact = similarities.truth(vectors)
    block = similarities.unit_float32(vectors)
    works: dict[tuple[str, str], Callable[[], Cosines]] = {
        ("memory", name): partial(function, vectors)
        for name, function in similarities.FROM_FLOAT16.items()
    }
    works |= {
        ("memory, float32", name): partial(function, block)
        for name, function in similarities.FROM_FLOAT32.items()
    }
    errors, samples = {}, {key: [] for key in works}
    for key, work in works.items():
        if key[1] == similarities.SLOW:
            found, once = _timed(work)
            samples[key].append(once)
        else:
            found = work()  # warms up as well
        errors[key] = _error(key[1], found, exact)
    fast = [key for key in works if key[1] != similarities.SLOW]
    for number in range(rounds):
        turn = number % len(fast)
        for key in [*fast[turn:], *fast[:turn]]:
            samples[key].append(_timed(works[key])[1])
    return [_row(head, size, *key, samples[key], errors[key]) for key in works]


def _timed(work: Callable[[], Cosines]) -> tuple[Cosines, Sample]:
    peak = Peak("cpu")
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return found, Sample(cpu, wall, peak.read())


def _error(name: str, found: Any, exact: Any) -> float:
    if found.shape != exact.shape:
        raise Disagreement(f"{name}: cosines of shape {found.shape} instead of {exact.shape}")
    error = float(np.abs(found - exact).max())
    if not error <= ERROR:  # NaN is none
        raise Disagreement(f"{name}: cosines differ from float64's by {error:.1e}")
    return error


def _from_shards(head: rows.Row, size: Size, rounds: int) -> list[rows.Row]:
    with tempfile.TemporaryDirectory(prefix="scmini-filter-") as folder:
        return _streamed(head, size, rounds, Path(folder))


def _streamed(head: rows.Row, size: Size, rounds: int, root: Path) -> list[rows.Row]:
    inputs = root / "inputs"
    inputs.mkdir()
    write_inputs(inputs, size)
    os.sync()  # or what is written back would be timed
    _in_child(READING, inputs, root / "out")  # into the page cache, as far as memory goes
    expected = _expected(size)
    samples: dict[str, list[Sample]] = {name: [] for name in STREAMS}
    errors: dict[str, float | None] = {}
    names = list(STREAMS)
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            if name == STAGE and number:
                continue  # it takes minutes
            found, sample = _in_child(name, inputs, root / "out")
            errors[name] = None
            if found is not None:
                if len(found) != size.prompts:
                    raise Disagreement(f"{name}: {len(found)} prompts instead of {size.prompts}")
                errors[name] = _error(name, found[: len(expected)], expected)
            samples[name].append(sample)
            rows.say(
                f"  {name:32} {sample.cpu_seconds:8.2f} s CPU {sample.wall_seconds:8.2f} s "
                f"{sample.peak['total_peak_bytes'] / 2**20:8.0f} MiB, "
                f"{sample.disk_bytes / 1e9:.1f} GB from the disk"
            )
    return [_row(head, size, "shards", name, samples[name], errors[name]) for name in STREAMS]


def _expected(size: Size) -> Any:
    """The first shards' cosines in float64."""
    first = similarities.blocks(size)
    chosen = [vectors for _, vectors in zip(range(_CHECKED_SHARDS), first, strict=False)]
    return np.concatenate([similarities.truth(vectors) for vectors in chosen])


def _in_child(name: str, inputs: Path, out: Path) -> tuple[Any, Sample]:
    """One pass in a fresh process, so that what it holds is what such a process needs."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=stream, args=(name, inputs, out, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{name}: its process ended with {process.exitcode}") from None
    process.join()
    cosines = out / "cosines.npy"
    return np.load(cosines) if cosines.exists() else None, Sample(**result)


def _row(
    head: rows.Row, size: Size, mode: str, name: str, samples: list[Sample], error: float | None
) -> rows.Row:
    seconds = rows.spread([sample.cpu_seconds for sample in samples])
    bytes_read = size.bytes * (2 if mode == "memory, float32" else 1)
    return {
        **head,
        "case": {
            "prompts": size.prompts,
            "answers": size.answers,
            "dimensions": size.dimensions,
        },
        "mode": mode,
        "peer": name,
        "rounds": len(samples),
        "seconds": seconds,
        "wall_seconds": rows.spread([sample.wall_seconds for sample in samples]),
        "dots_per_second": size.dots / seconds["median"],
        "gbps": bytes_read / seconds["median"] / 1e9,
        "peak_bytes": max(sample.peak["peak_bytes"] for sample in samples),
        "total_peak_bytes": max(sample.peak["total_peak_bytes"] for sample in samples),
        "disk_bytes": max(sample.disk_bytes for sample in samples),
        "error": None if error is None else {"value": error},
    }
