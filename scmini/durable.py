"""Files that are on disk whole or not at all, and what a person is told when the disk fails."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scmini.errors import EnvironmentProblem, StageFailed

_ALMOST_FULL = 64 << 20


def write_atomic(path: Path, data: bytes) -> None:
    """Write all of a file or none of it, and have it on disk."""
    torn = path.with_name(f".{path.name}.tmp")
    torn.write_bytes(data)
    sync(torn)
    os.replace(torn, path)
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def disk_full_is_said(root: Path) -> Iterator[None]:
    """Turn the errors of a full or failing disk into an `EnvironmentProblem` that names `root`."""
    try:
        yield
    except StageFailed:  # says already what happened, and quotes a log
        raise
    except Exception as error:
        if (said := _said_of_disk(error, root)) is None:
            raise
        raise EnvironmentProblem(f"{root}: {said}") from error


def _said_of_disk(error: Exception, root: Path) -> str | None:
    """What to tell of an error for which the disk is to blame; None for any other."""
    if _is_disk_full(error, root):
        return "the disk is full. Everything finished is kept: free some space and run again"
    number = error.errno if isinstance(error, OSError) else None
    for known, (words, remedy) in _TROUBLES.items():
        # Libraries written in Rust give the number in their text alone.
        if number == known or (number is None and f"(os error {int(known)})" in str(error)):
            name = getattr(error, "filename", None)
            where = f" ({name})" if name else ""
            return f"{words}{where}. Everything finished is kept: {remedy} and run again"
    return None


_TROUBLES = {
    errno.EIO: ("the disk reports an input/output error", "check the disk and its cable (dmesg)"),
    errno.EROFS: ("the disk is read-only", "mount it for writing"),
    errno.EFBIG: ("a file may not become that large", "lift the limit (ulimit -f)"),
    errno.ESTALE: ("the network disk was lost", "mount it again"),
}


def _is_disk_full(error: Exception, root: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if "No space left on device" in str(error):
        return True
    # torch.save says only that its file is shorter than what it wrote.
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        with suppress(OSError):
            return shutil.disk_usage(root).free < _ALMOST_FULL
    return False


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
