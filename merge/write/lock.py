"""One owner per output: an advisory lock on a file beside it that names the owner.

The kernel drops the lock when its process dies, so a dead owner on this host never blocks.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from merge.errors import OutputRefused
from merge.write import ops

__all__ = ["OutputLock"]


class OutputLock:
    """Held from `acquire` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock or raise OutputRefused, which names the process that holds it."""
        while True:
            fd = ops.open_file(self.path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = os.pread(fd, 4096, 0).decode(errors="replace")
                os.close(fd)
                raise OutputRefused(
                    "another run is writing this output",
                    file=self.path,
                    found=_describe(owner),
                    do="wait for it, or choose another output",
                ) from None
            if self._is_current(fd):
                break
            os.close(fd)  # its owner removed the file between our open and our lock
        self._fd = fd
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": int(time.time())}
        os.ftruncate(fd, 0)
        ops.pwrite(fd, json.dumps(me).encode(), 0)

    def _is_current(self, fd: int) -> bool:
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        here = os.fstat(fd)
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def release(self) -> None:
        """Remove the file, then drop the lock."""
        if self._fd is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None


def _describe(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not written its name yet"
