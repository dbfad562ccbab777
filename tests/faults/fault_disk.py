"""A small disk that can be filled: a tmpfs, where mounting one is allowed."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOM = 1 << 30


class Disk:
    """A tmpfs at `path`, or just a folder if `mounted` is false."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.mounted = self._mount(f"size={_ROOM}")

    def _mount(self, options: str, remount: bool = False) -> bool:
        words = ["-o", f"remount,{options}"] if remount else ["-t", "tmpfs", "-o", options, "tmpfs"]
        try:
            done = subprocess.run(["mount", *words, str(self.path)], capture_output=True)
        except OSError:
            return False
        return done.returncode == 0

    @contextmanager
    def nearly_full(self, free: int) -> Iterator[None]:
        """So many bytes are free, rounded to pages."""
        found = os.statvfs(self.path)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        assert self._mount(f"size={used + free}", remount=True)
        try:
            yield
        finally:
            assert self._mount(f"size={_ROOM}", remount=True)

    def close(self) -> None:
        """Unmount it."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)
