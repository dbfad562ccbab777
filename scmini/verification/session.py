"""All checks for a device and a model, told as events."""

import importlib.metadata
import importlib.util
import platform
from dataclasses import asdict

import torch

from scmini import __version__, console
from scmini.models.loading import device
from scmini.verification.checks import Check, Row, run
from scmini.verification.kernels import kernel_checks
from scmini.verification.model import chosen_subject, model_checks, tiny_subject

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes")
TINY_NAME = "tiny random Llama"


def verify(source: str | None) -> None:
    """Do every check on this process's device and emit what comes of it.

    Args:
        source: folder or hub name of a model; None takes a tiny one of random weights.

    Raises:
        DataError, EnvironmentProblem: the model cannot be loaded.
    """
    where = device()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    begin = {"event": "begin", "device": name, "model": source or TINY_NAME}
    console.emit({**begin, "versions": versions()})
    todo = checks(where, source)

    def start(check: Check) -> None:
        now = {"name": check.name, "implementation": check.implementation, "dtype": check.dtype}
        console.emit({"event": "start", **now})
        label = f"{check.name} ({check.implementation}, {check.dtype})"
        numbers = {"done": todo.index(check), "total": len(todo), "unit": "checks"}
        console.emit({"event": "progress", **numbers, "figures": {"now": label}})

    def report(row: Row) -> None:
        console.emit({"event": "check", **asdict(row)})

    run(todo, start, report)


def checks(where: torch.device, source: str | None) -> list[Check]:
    """Model first, being what matters and what may not load; then the operations by themselves."""
    on_gpu = where.type == "cuda"
    missing = "" if on_gpu else interpreter_is_missing()
    automatic = "triton" if on_gpu else "torch"
    dtypes = [torch.bfloat16, torch.float32] if on_gpu else [torch.float32]
    if source is None:
        subjects = [tiny_subject(dtype) for dtype in dtypes]
    else:
        subjects = [chosen_subject(source)]
    found = [check for subject in subjects for check in model_checks(subject, automatic)]
    for dtype in dtypes:
        if not on_gpu:
            found += kernel_checks(where, dtype, "torch", "torch")
        shown = "triton" if on_gpu else "triton, interpreted"
        found += kernel_checks(where, dtype, "triton", shown, skip=missing)
    return found


def interpreter_is_missing() -> str:
    """Why Triton's interpreter cannot run the kernels here; empty if it can."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    installed = [importlib.metadata.version(name) for name in ("triton", "numpy")]
    triton, numpy = (tuple(map(int, each.split(".")[:2])) for each in installed)
    if triton < (3, 7) and numpy >= (2, 4):
        return f"the interpreter of triton {installed[0]} needs numpy < 2.4, not {installed[1]}"
    return ""


def versions() -> dict[str, str | None]:
    """Of everything that computes here; None for what is not installed."""
    found: dict[str, str | None] = {"scmini": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
