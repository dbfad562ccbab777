"""The sample benchmark: tokens per second of drawing n answers to each prompt.

All engines serve the same folders of model and adapter, get the same token ids, decode as many
sequences at once, and draw as many tokens. On the CPU they are all started and then take turns,
draw by draw, in rotated order; on CUDA they run one after another. Starting is reported apart.
Prompts are new ones in each round, so that no engine has them in its prefix cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rows
import torch
from cases import Shape
from memory import Peak, status_bytes
from peers.names import BARE, BARE_TEXTS, GENERATE, OURS_VLLM, TRANSFORMERS
from peers.samplers import Engine, Prompts, Served, start, write_model

IN_VLLM = (OURS_VLLM, BARE, BARE_TEXTS)
IN_PROCESS = (TRANSFORMERS, GENERATE)
PYTHON = "SCMINI_VLLM_PYTHON"
"""Environment variable: the interpreter of an environment with vLLM."""


@dataclass(frozen=True)
class Draw:
    """`answers` answers of `new_tokens` tokens to each prompt, of shortest to longest tokens."""

    prompts: int
    answers: int
    shortest: int
    longest: int
    new_tokens: int = 64

    @property
    def tokens(self) -> int:
        return self.prompts * self.answers * self.new_tokens

    def make(self, vocab: int, seed: int) -> Prompts:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(self.shortest, self.longest, size=self.prompts, endpoint=True)
        return [rng.integers(2, vocab, size=length).tolist() for length in lengths]


@dataclass
class Live:
    """A started engine and what it took for each case."""

    name: str
    engine: Engine
    start_seconds: float
    processes: list[int]
    """Those that it has started, by number."""
    times: dict[Draw, list[tuple[float, float]]] = field(default_factory=dict)
    """Processor and wall seconds of each round."""
    peaks: dict[Draw, int] = field(default_factory=dict)


class Unequal(SystemExit):
    """An engine drew another number of tokens than it was asked for."""


SHAPES = {
    "cpu": Shape("llama-4m", 4, 256, 4, 2, 64, 704, 2048, rank=8),
    "cuda": Shape("llama-1b", 16, 2048, 32, 8, 64, 8192, 32000, rank=16),
}
DRAWS = {
    "cpu": (Draw(64, 32, 24, 96), Draw(256, 8, 24, 96)),
    "cuda": (Draw(64, 32, 128, 512), Draw(256, 8, 128, 512)),
}


def has_vllm(python: str) -> bool:
    """Whether an interpreter is one and finds vLLM."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([python, "-c", look], check=False, stderr=subprocess.DEVNULL)
    except OSError:
        return False
    return done.returncode == 0


def measure(
    draws: Sequence[Draw],
    shape: Shape,
    device: str,
    rounds: int,
    python: str = sys.executable,
    names: Sequence[str] = (*IN_VLLM, *IN_PROCESS),
) -> Iterator[list[rows.Row]]:
    """The rows of each case, once all are measured.

    Args:
        draws: the cases; their answers are equally long.
        rounds: measured draws of each engine and case, after a small one that warms up.
        python: of an environment with vLLM.
        names: of the engines.

    Raises:
        Unequal: an engine drew too few or too many tokens.
        SystemExit: the bare loop failed, for a reason that it has printed.
    """
    head = {"what": "sample", **rows.header(device, rows.new_run()), "mode": "draw"}
    head["ceilings"] = rows.ceilings(device)
    if device == "cuda":
        torch.cuda.empty_cache()  # engines in other processes want it
    with tempfile.TemporaryDirectory(prefix="scmini-sample-") as name:
        root = Path(name)
        served = Served(
            model=root / "model",
            adapter=root / "adapter",
            scratch=root / "scratch",
            device=device,
            rank=shape.rank,
            longest_prompt=max(draw.longest for draw in draws),
            new_tokens=draws[0].new_tokens,
        )
        write_model(served, shape)
        together = [list(names)] if device == "cpu" else [[each] for each in names]
        lives: list[Live] = []
        for group in together:
            with ExitStack() as stack:
                started = [_start(each, served, python, stack) for each in group]
                for draw in draws:
                    _take_turns(started, draw, shape, rounds)
            lives += started
    head |= {"dtype": served.dtype, "rank": shape.rank, "rounds": rounds}
    for draw in draws:
        case = {**asdict(draw), "model": shape.name, "vocab": shape.vocab}
        yield _rows({**head, "case": case}, draw, lives)


def _start(name: str, served: Served, python: str, stack: ExitStack) -> Live:
    before, began = set(_descendants()), time.perf_counter()
    engine = start(name, served, python)
    stack.callback(engine.close)
    seconds = time.perf_counter() - began
    rows.say(f"  {name:28} started in {seconds:.1f} s")
    return Live(name, engine, seconds, sorted(set(_descendants()) - before))


def _take_turns(lives: Sequence[Live], draw: Draw, shape: Shape, rounds: int) -> None:
    rows.say(f"sample: {draw.prompts} prompts x {draw.answers} x {draw.new_tokens} tokens")
    small = Draw(min(8, draw.prompts), draw.answers, draw.shortest, draw.longest, draw.new_tokens)
    for live in lives:
        _drawn(live, small, small.make(shape.vocab, seed=0))
    for number in range(rounds):
        prompts = draw.make(shape.vocab, seed=1 + number)
        turn = number % len(lives)
        for live in [*lives[turn:], *lives[:turn]]:
            seconds = _drawn(live, draw, prompts)
            live.times.setdefault(draw, []).append(seconds)
            rows.say(
                f"  {live.name:28} {seconds[0]:8.2f} s CPU {seconds[1]:8.2f} s, "
                f"{draw.tokens / seconds[1]:,.0f} tokens/s"
            )


def _drawn(live: Live, draw: Draw, prompts: Prompts) -> tuple[float, float]:
    """Processor seconds, of this process and those it has started, and wall seconds."""
    peak = Peak(str(live.engine.facts["device"]).partition(":")[0]) if not live.processes else None
    cpu, wall = _cpu_seconds(), time.perf_counter()
    found = live.engine.draw(prompts, draw.answers)
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
    if (found["answers"], found["tokens"]) != (draw.prompts * draw.answers, draw.tokens):
        raise Unequal(f"{live.name}: {found} instead of {draw.tokens} tokens")
    if peak is not None:
        live.peaks[draw] = max(live.peaks.get(draw, 0), peak.read()["total_peak_bytes"])
    else:
        live.peaks[draw] = sum(status_bytes("VmHWM", number) for number in live.processes)
    return cpu, wall


def _rows(common: rows.Row, draw: Draw, lives: Sequence[Live]) -> list[rows.Row]:
    spreads = {live.name: _spreads(live, draw) for live in lives}
    clock = "seconds" if common["device"] == "cpu" else "wall_seconds"
    bare = spreads.get(BARE)
    found = []
    for live in lives:
        spread = spreads[live.name]
        row = {
            **common,
            "peer": live.name,
            "engine": live.engine.facts,
            "start_seconds": live.start_seconds,
            "tokens": draw.tokens,
            **spread,
            "tokens_per_second": draw.tokens / spread[clock]["median"],
        }
        if live.name in IN_PROCESS or common["device"] == "cpu":
            row["total_peak_bytes"] = live.peaks[draw]
        if bare is not None:
            row["of_bare"] = bare[clock]["median"] / spread[clock]["median"]
        found.append(row)
    return found


def _spreads(live: Live, draw: Draw) -> Mapping[str, dict[str, Any]]:
    cpu, wall = zip(*live.times[draw], strict=True)
    return {"seconds": rows.spread(cpu), "wall_seconds": rows.spread(wall)}


def _descendants() -> list[int]:
    """Processes that this one has started, and theirs, by number."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(_stat(path)[1])
        except OSError:
            continue  # it has ended
    found, new = [], [os.getpid()]
    while new:
        new = [number for number, parent in parents.items() if parent in new]
        found += new
    return found


def _cpu_seconds() -> float:
    """Of this process and all that it has started and that live."""
    ticks = 0
    for number in _descendants():
        values = _stat(Path(f"/proc/{number}/stat"))
        ticks += int(values[11]) + int(values[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _stat(path: Path) -> list[str]:
    """The values after the name, which may hold anything: state, parent, ..."""
    return path.read_text(encoding="utf-8").rpartition(")")[2].split()
