"""Lock files, held with flock: they end with the process that holds them, however that ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scmini.errors import EnvironmentProblem, StoreBusy

_LOCK_SECONDS = 0.5


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file; `StoreBusy(busy)` if somebody holds it."""
    handle = _acquire(path, busy)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()  # safe: whoever waits for it notices that the file is another one
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock file."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _acquire(path: Path, busy: str) -> int:
    """Lock a file that still has its name; patient for a moment, as `is_locked` locks as well."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass  # its holder removed it after we opened it: open the new one
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(handle)
                raise StoreBusy(f"{busy} (lock: {path})") from None
            time.sleep(0.02)
        except OSError as error:
            os.close(handle)
            raise EnvironmentProblem(
                f"{path}: this file system cannot lock ({error.strerror})"
            ) from None
        os.close(handle)
