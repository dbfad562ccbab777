"""The step benchmark: one optimizer step of DPO, every implementation in a process of its own.

On the CPU all processes live at once and take one step each per round, in rotated order, so that
whatever else the machine does falls on all of them. On CUDA they run one after another, since the
models would not fit side by side. The first step of each warms up and shows that all compute the
same thing: their losses and the adapters' gradients are compared before anything is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rows
import torch
from cases import Case, Shape, as_row, counts
from peers.implementations import IMPLEMENTATIONS, Implementation, Setup
from peers.worker import STEP, STOP, Job, work

LOSS, COSINE, NORM = 1e-4, 0.9999, 1e-3
"""How far losses (relative), gradients' directions and norms (relative) may differ in float32."""
HALF_LOSS, HALF_COSINE, HALF_NORM = 0.05, 0.95, 0.1
"""In bfloat16, where layouts round differently (tenths of a nat per response) and TRL keeps the
adapter in 16 bits. Enough to see a wrong mask, position or weight, which leave nothing alike."""
QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
PRELOADED = ("transformers.models.llama.modeling_llama", "trl.trainer.dpo_trainer", "peft")
START_SECONDS, STEP_SECONDS = 1800.0, 3600.0


class Disagreement(SystemExit):
    """Two implementations compute different things."""


@dataclass
class Live:
    """A running implementation and what it has answered."""

    implementation: Implementation
    process: Any
    pipe: Connection
    gradients: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None

    def ask(self, word: str) -> None:
        if self.failed is None:
            self.pipe.send(word)

    def answer(self, seconds: float) -> Any:
        """The next message; None where the implementation ran out of memory."""
        name = self.implementation.name
        if self.failed is not None:
            return None
        if not self.pipe.poll(seconds):
            raise SystemExit(f"{name}: no answer in {seconds:.0f} seconds")
        try:
            message = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{name}: its process ended with {self.process.exitcode}") from None
        if isinstance(message, dict) and "failed" in message:
            if message["fatal"]:
                raise SystemExit(f"{name}: {message['failed']}")
            self.failed = message["failed"]
            rows.say(f"  {name}: {self.failed}")
            return None
        return message


def measure(
    cases: Sequence[tuple[Shape, Case]],
    device: str,
    rounds: int,
    *,
    precomputed: bool = False,
    cap_gib: float | None = None,
    quantised: bool | None = None,
    checkpointing: bool | None = None,
) -> Iterator[list[rows.Row]]:
    """The rows of one case after another.

    Args:
        rounds: measured steps of each implementation, after one that warms up.
        precomputed: also with the reference's log-probabilities made beforehand.
        cap_gib: GPU memory for each process.
        quantised, checkpointing: by default as on the device: only on CUDA.

    Raises:
        Disagreement: losses or gradients differ by more than rounding.
        SystemExit: an implementation failed, with its reason.
    """
    names = [
        name
        for name, each in IMPLEMENTATIONS.items()
        if (precomputed or not each.precomputed) and (each.trainer != "trl" or find_spec("trl"))
    ]
    head = rows.header(device, rows.new_run())
    head["absent"] = {} if find_spec("trl") else {"trl": "not installed"}
    head["ceilings"] = rows.ceilings(device)
    on_cuda = device == "cuda"
    for shape, case in cases:
        setup = Setup(
            shape,
            device,
            on_cuda if quantised is None else quantised,
            on_cuda if checkpointing is None else checkpointing,
        )
        rows.say(f"step: P,R,k = {case}, {case.prompts} prompt(s), V = {shape.vocab}")
        with tempfile.TemporaryDirectory() as folder:
            lives, agreement = _measure_case(names, setup, case, rounds, cap_gib, Path(folder))
        yield _rows(head, setup, case, lives, agreement, cap_gib)


def _measure_case(
    names: Sequence[str], setup: Setup, case: Case, rounds: int, cap_gib: float | None, folder: Path
) -> tuple[list[Live], dict[str, Any]]:
    jobs = [
        Job(name, setup, case, torch.get_num_threads(), folder / f"{name}.pt", cap_gib)
        for name in names
    ]
    if setup.device == "cpu":
        with _started(jobs) as lives:
            _warm_up(lives)
            agreement = _compare(lives, setup)
            for number in range(rounds):
                turn = number % len(lives)
                for live in [*lives[turn:], *lives[:turn]]:
                    _step(live)
        return lives, agreement
    lives = []
    for job in jobs:
        with _started([job]) as (live,):
            _warm_up([live])
            for _ in range(rounds):
                _step(live)
        lives.append(live)
    return lives, _compare(lives, setup)


@contextmanager
def _started(jobs: Sequence[Job]) -> Iterator[list[Live]]:
    """The jobs' processes, ready for their first step; all have ended afterwards."""
    context = _context()
    # read when torch, tqdm and datasets are imported
    wanted = {"OMP_NUM_THREADS": str(jobs[0].threads), **QUIET}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    lives: list[Live] = []
    try:
        for job in jobs:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(job, theirs), daemon=True)
            process.start()
            theirs.close()
            live = Live(IMPLEMENTATIONS[job.implementation], process, ours, job.gradients)
            lives.append(live)
        for live in lives:
            live.answer(START_SECONDS)
        yield lives
        for live in lives:
            live.ask(STOP)
            live.answer(STEP_SECONDS)
            live.process.join()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for live in lives:
            if live.process.is_alive():
                live.process.terminate()
            live.process.join()
            live.pipe.close()


def _context() -> Any:
    """How processes are started: without a GPU, from one that has the libraries imported.

    Where there is a GPU, importing some of them initialises CUDA, which must not be forked.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _step(live: Live) -> None:
    live.ask(STEP)
    result = live.answer(STEP_SECONDS)
    if result is None:
        return
    live.steps.append(result)
    seconds, peak = result["cpu_seconds"], result["peak_bytes"] / 2**20
    rows.say(
        f"  {live.implementation.name:24} {seconds:8.2f} s CPU "
        f"{result['wall_seconds']:8.2f} s {peak:8.0f} MiB"
    )
    live.answer(STEP_SECONDS)  # "ready" for the next one


def _warm_up(lives: Sequence[Live]) -> None:
    for live in lives:
        _step(live)


def _compare(lives: Sequence[Live], setup: Setup) -> dict[str, Any]:
    """Loss and gradients of the first step against TRL's (or `pairs`), by implementation.

    Raises:
        Disagreement: beyond rounding.
    """
    able = [live for live in lives if live.steps]
    order = ("trl", "trl_one_pair", "pairs", "grouped", "trees")
    by_name = {live.implementation.name: live for live in able}
    base = next((by_name[name] for name in order if name in by_name), None)
    if base is None:
        return {}
    reference = torch.load(base.gradients)
    loss = base.steps[0]["loss"]
    if abs(loss - 0.693147) < 1e-4:
        raise Disagreement("the loss is log 2: rewards are zero, so nothing would be compared")
    found = {}
    for live in able:
        name = live.implementation.name
        figures = _difference(torch.load(live.gradients), reference)
        figures["loss"] = live.steps[0]["loss"]
        figures["loss_error"] = abs(live.steps[0]["loss"] / loss - 1)
        figures["compared_with"] = base.implementation.name
        found[name] = figures
        _check(name, figures, setup)
    return found


def _difference(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> dict[str, float | str]:
    if ours.keys() != theirs.keys():
        raise Disagreement(f"other parameters: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    products, cosines = torch.zeros(3, dtype=torch.float64), []
    for name, a in ours.items():
        x, y = a.double().flatten(), theirs[name].double().flatten()
        part = torch.stack((x @ y, x @ x, y @ y))
        products += part
        cosines.append(float(part[0] / (part[1] * part[2]).sqrt()))
    dot, ours_square, theirs_square = products.tolist()
    return {
        "cosine": dot / (ours_square * theirs_square) ** 0.5,
        "worst_cosine": min(cosines),
        "norm_ratio": (ours_square / theirs_square) ** 0.5,
    }


def _check(name: str, figures: dict[str, Any], setup: Setup) -> None:
    half = setup.dtype != torch.float32
    loss, cosine, norm = (HALF_LOSS, HALF_COSINE, HALF_NORM) if half else (LOSS, COSINE, NORM)
    fine = (
        figures["loss_error"] <= loss
        and figures["cosine"] > cosine
        and abs(figures["norm_ratio"] - 1) <= norm
    )
    if not fine:
        raise Disagreement(
            f"{name} and {figures['compared_with']} differ at step 1: loss by "
            f"{figures['loss_error']:.2e} (allowed {loss:g}), gradient cosine "
            f"{figures['cosine']:.7f} (at least {cosine:g}), ratio of norms "
            f"{figures['norm_ratio']:.5f}"
        )


def _rows(
    head: rows.Row,
    setup: Setup,
    case: Case,
    lives: Sequence[Live],
    agreement: dict[str, Any],
    cap_gib: float | None,
) -> list[rows.Row]:
    shape = setup.shape
    common = {
        "what": "step",
        **head,
        "case": as_row(shape, case),
        "dtype": setup.dtype_name,
        "checkpointing": setup.checkpointing,
        "cap_gib": cap_gib,
    }
    found = []
    for live in lives:
        each = live.implementation
        count, flop = counts(case, each.layout), each.flop(setup, case)
        row = {**common, "peer": each.name, "tokens": count.tokens, "targets": count.targets}
        row["tflop"] = flop / 1e12
        ours = next(
            other
            for other in lives
            if other.implementation.layout == "trees"
            and other.implementation.precomputed == each.precomputed
        )
        row["predicted_ratio"] = flop / ours.implementation.flop(setup, case)
        found.append(row | (_results(live, ours, setup, row) if live.failed is None else {}))
        if live.failed is not None:
            found[-1]["failed"] = live.failed
        else:
            found[-1]["error"] = agreement[each.name]
    return found


def _results(live: Live, ours: Live, setup: Setup, row: rows.Row) -> rows.Row:
    """What was measured; `measured_ratio` is how many times as long as `ours` it takes."""
    clock = "cpu_seconds" if setup.device == "cpu" else "wall_seconds"
    steps = live.steps[1:]
    seconds = rows.spread([step[clock] for step in steps])
    found = {
        "rounds": len(steps),
        "seconds": seconds,
        "wall_seconds": rows.spread([step["wall_seconds"] for step in steps]),
        **{key: value for key, value in steps[-1].items() if key.endswith("_bytes")},
        **rows.shares(row, seconds["median"]),
    }
    if ours.failed is None:
        base = rows.spread([step[clock] for step in ours.steps[1:]])
        found["measured_ratio"] = seconds["median"] / base["median"]
    return found
