"""A process that holds one implementation and takes one step of it whenever it is told to."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cases import Case
from memory import Peak

from peers.implementations import IMPLEMENTATIONS, Setup

STEP, STOP = "step", "stop"


@dataclass(frozen=True)
class Job:
    """What a worker is started with."""

    implementation: str
    setup: Setup
    case: Case
    threads: int
    gradients: Path
    """File for the adapter's gradients of the first step."""
    cap_gib: float | None = None
    """Memory of the GPU that this process may use."""


def work(job: Job, pipe: Connection) -> None:
    """Answer "ready", then one result per "step" until "stop"; {"failed": why} ends it early."""
    try:
        _work(job, pipe)
    except Exception as error:
        kind = type(error).__name__
        if _is_out_of_memory(kind, str(error)):
            pipe.send({"failed": "out of memory", "fatal": False})
        else:
            pipe.send({"failed": f"{kind}: {error}\n{traceback.format_exc()}", "fatal": True})


def _is_out_of_memory(kind: str, message: str) -> bool:
    """PyTorch's own error, or that of a library for which PyTorch has left nothing."""
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return kind in ("OutOfMemoryError", "DoesNotFit") or any(word in message for word in words)


def _work(job: Job, pipe: Connection) -> None:
    # A spawned process: its libraries are imported by what follows. Of several GPUs it sees the
    # first, or a Trainer would spread its model over all of them.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch

    from peers.trainers import Conductor, Halt, build

    torch.set_num_threads(job.threads)
    if job.cap_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap_gib * 2**30 / total))
    with tempfile.TemporaryDirectory() as folder:
        implementation = IMPLEMENTATIONS[job.implementation]
        trainer, model = build(implementation, job.setup, job.case, Path(folder))
        meter = _Meter(job.setup.device)

        def before() -> bool:
            pipe.send("ready")
            if pipe.recv() != STEP:
                return False
            meter.start()
            return True

        def after(loss: float) -> None:
            pipe.send({"loss": loss, **meter.stop()})

        def save_gradients() -> None:
            trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            torch.save({n: p.grad.float().cpu() for n, p in trained}, job.gradients)

        trainer.add_callback(Conductor(trainer, before, after, save_gradients))
        try:
            trainer.train()
        except Halt:
            pipe.send("stopped")


class _Meter:
    """Seconds of a step, and the peak memory of all steps above what was there before the first."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.peak: Peak | None = None
        self.clocks = (0.0, 0.0)

    def start(self) -> None:
        gc.collect()
        if self.peak is None:
            self.peak = Peak(self.device)
        self._wait()
        self.clocks = (time.process_time(), time.perf_counter())

    def stop(self) -> dict[str, Any]:
        self._wait()
        cpu, wall = time.process_time() - self.clocks[0], time.perf_counter() - self.clocks[1]
        assert self.peak is not None
        return {"cpu_seconds": cpu, "wall_seconds": wall, **self.peak.read()}

    def _wait(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
