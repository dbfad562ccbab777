"""The process of `scmini verify`: `python -m scmini.verification REQUEST`.

The request is JSON, {"device": "cpu", "cuda" or null, "model": folder, name or null}. Events go to
what was stdout, one line of JSON each; whatever libraries print goes to stderr. The process ends
when its stdin does, so it never outlives the one that started it.
"""

import json
import os
import sys
import threading
import traceback
from typing import Any

from scmini import console
from scmini.errors import DoesNotFit, EnvironmentProblem, ScminiError


def main(request: dict[str, Any]) -> int:
    """Do all checks; the exit code is 0 whether they pass or not, else that of DESIGN 5.1."""
    _own_stdout()
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        _choose_device(request["device"])
        from scmini.verification.session import verify

        verify(request["model"])
    except Exception as error:
        traceback.print_exc()
        known = _as_known(error)
        text = str(known) if known else f"{type(error).__name__}: {error}"
        code = known.exit_code if known else 1
        console.emit({"event": "error", "message": text, "code": code, "expected": bool(known)})
        return code
    return 0


def _own_stdout() -> None:
    """Events leave where stdout was; stdout, that of libraries in C too, becomes stderr."""
    console.send_events_to(os.dup(1))
    os.dup2(2, 1)


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(6)


def _choose_device(device: str | None) -> None:
    """Before anything imports triton.language, which reads TRITON_INTERPRET then and there."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if torch.cuda.is_available():
        os.environ.pop("TRITON_INTERPRET", None)
    elif device == "cuda":
        raise EnvironmentProblem(
            "--device cuda: PyTorch finds no CUDA device (driver, CUDA build?)"
        )
    else:
        os.environ["TRITON_INTERPRET"] = "1"


def _as_known(error: Exception) -> ScminiError | None:
    if isinstance(error, ScminiError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return EnvironmentProblem(f"the Python package {error.name!r} is missing")
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return DoesNotFit("out of memory while loading the model")
    return None


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
