"""Without a GPU the Triton kernels run in Triton's interpreter, and workers share the cores.

Both variables must be set early: before anything imports triton.language, as bitsandbytes and PEFT
do, and before a stage's process is started.
"""

import os

import pytest
import torch

GIB_PER_WORKER = 4
"""What the largest test takes, its processes included."""

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`pytest -n auto`: a worker for each core, as far as memory goes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(_cores(), memory // (GIB_PER_WORKER << 30)))


if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, _cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
