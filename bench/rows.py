"""Result rows: one JSON line per (case, peer, device), appended, never replaced."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
KINDS = ("step", "head", "attention", "packing", "filter", "sample")
PACKAGES = (
    "torch", "triton", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "liger-kernel",
    "cut-cross-entropy", "numpy", "faiss-cpu",
)  # fmt: skip

Row = dict[str, Any]


def device_name(device: str) -> str:
    """Name of the folder of results: "cpu", or the GPU's name in lower case with hyphens."""
    if device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def header(device: str, run: str) -> Row:
    """What all rows of a run have in common."""
    return {
        "run": run,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device_name(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "versions": _versions(),
    }


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and the samples themselves."""
    low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    shown = [float(f"{x:.5g}") for x in samples]
    return {"median": middle, "p20": low, "p80": high, "samples": shown}


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """All rows of a file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise SystemExit(f"{path}, line {number}: not JSON") from None
    return found


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each (case, mode, peer) and device, in the order of first appearance."""
    latest: dict[str, Row] = {}
    for row in rows:
        latest[_key(row)] = row
    return list(latest.values())


def _key(row: Row) -> str:
    names = ("what", "device", "case", "dtype", "cap_gib", "mode", "peer")
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def ceilings(device: str) -> dict[str, float]:
    """What this machine reaches: a large matrix product (TFLOP/s) and a large copy (GB/s).

    In the dtype that the models have there: float32 on the CPU, bfloat16 on CUDA. Random data,
    since power and so clocks depend on it. A copy counts the bytes read and those written.
    """
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    product = _best_seconds(lambda: torch.mm(a, b), device)
    copy = _best_seconds(lambda: target.copy_(source), device)
    return {
        "gemm_tflops": 2 * size**3 / product / 1e12,
        "copy_gbps": 2 * source.nbytes / copy / 1e9,
    }


def _best_seconds(work: Any, device: str) -> float:
    work()
    return min(seconds(work, device) for _ in range(5))


def seconds(work: Any, device: str) -> float:
    """Of one call: between two events on CUDA, of this process's processor time on the CPU."""
    if device != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def shares(row: Mapping[str, Any], duration: float) -> Row:
    """TFLOP/s of the needed work of a row, and its share of the measured matrix product."""
    rate = row["tflop"] / duration
    return {"tflops": rate, "ceiling_share": rate / row["ceilings"]["gemm_tflops"]}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8"))
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _commit() -> str:
    """The commit, with "+" if tracked files differ from it; "unknown" outside a repository."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def new_run() -> str:
    """A name for one call of run.py, by time and process."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
