"""Peak memory of a stretch of a process, above what it held before."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path


class Peak:
    """Starts counting when made; `read` gives the peak so far. On the CPU: resident memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.resident = torch.cuda.memory_allocated()
            return
        # What was freed before goes back to the system, or it would hide a part of what comes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
        self.resident = status_bytes("VmRSS")

    def read(self) -> dict[str, int]:
        """`peak_bytes` above the start, `total_peak_bytes` with what was there; on CUDA also what
        the allocator reserved."""
        if self.device == "cuda":
            import torch

            peak = torch.cuda.max_memory_allocated()
            more = {"reserved_bytes": torch.cuda.max_memory_reserved()}
        else:
            peak, more = status_bytes("VmHWM"), {}
        return {"peak_bytes": peak - self.resident, "total_peak_bytes": peak, **more}


def status_bytes(name: str, process: int | None = None) -> int:
    """VmRSS (resident now) or VmHWM (at most, since it was reset); by default of this process."""
    path = Path(f"/proc/{process or os.getpid()}/status")
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc has no {name}")
