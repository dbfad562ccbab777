"""How much memory the running stage holds: of the GPU by nvidia-smi, of the machine by /proc.

Nothing here waits: nvidia-smi runs in the background and is read when it has ended.
"""

import contextlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from scmini.console import size

_EVERY_SECONDS, _GPU_EVERY_SECONDS, _GPU_PATIENCE = 1.0, 10.0, 30.0
_MIB = 1 << 20


class Gauges:
    """Looks at memory now and then."""

    def __init__(self) -> None:
        self._text, self._looked = "", -_EVERY_SECONDS
        self._smi = None if _are_hidden() else shutil.which("nvidia-smi")
        self._asked, self._answer = -_GPU_EVERY_SECONDS, ""
        self._process: subprocess.Popen[str] | None = None
        self._peak = 0.0

    def text(self, pid: int | None) -> str:
        """GPU memory used, with the most seen, and the memory of process `pid` with its peak."""
        now = time.monotonic()
        if now - self._looked >= _EVERY_SECONDS:
            self._looked = now
            self._ask(now)
            self._text = ", ".join(filter(None, (self._answer, _resident(pid))))
        return self._text

    def new_task(self) -> None:
        """The most that was seen of the GPU's memory begins anew."""
        self._peak, self._looked = 0.0, -_EVERY_SECONDS

    def close(self) -> None:
        """End what still runs."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs
                self._process.communicate(timeout=1)
            self._process = None

    def _ask(self, now: float) -> None:
        if self._process is not None:
            if self._process.poll() is not None:
                self._read(self._process.communicate()[0])
                self._process = None
            elif now - self._asked > _GPU_PATIENCE:
                self.close()
        elif self._smi is not None and now - self._asked >= _GPU_EVERY_SECONDS:
            self._asked = now
            command = [self._smi, "--query-gpu=memory.used,memory.total"]
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
            if first:
                command.append(f"--id={first}")
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    [*command, "--format=csv,noheader,nounits"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,  # Ctrl-C is none of its business
                )

    def _read(self, answer: str) -> None:
        """Take in what nvidia-smi said; of several cards the first."""
        found = re.match(r"\s*(\d+)\s*,\s*(\d+)\s*(?:\n|$)", answer)
        if found is None:
            self._answer, self._smi = "", None  # a card that does not tell will not tell later
            return
        used, total = (int(number) * _MIB for number in found.groups())
        self._peak = max(self._peak, used)
        self._answer = f"GPU {size(used)} of {size(total)} (peak {size(self._peak)})"


def _are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all cards."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.split(",")[0].strip() in ("", "-1")


def _resident(pid: int | None) -> str:
    """Memory of a process, where the system has /proc."""
    if pid is None:
        return ""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE))
    if len(found) < 2:
        return ""
    now, peak = (size(int(found[key]) * 1024) for key in ("VmRSS", "VmHWM"))
    return f"memory {now} (peak {peak})"
