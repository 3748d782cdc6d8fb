"""The file operations of the sink, in one place, so that a test can make each of them fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["allocate", "fsync", "fsync_folder", "mkdir", "open_file", "pwrite", "rename", "unlink"]


def open_file(path: Path, flags: int) -> int:
    """A file descriptor; a new file's mode follows the umask."""
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


def allocate(fd: int, size: int) -> None:
    """Reserve ``size`` bytes on the disk, so that a full disk shows before the work, not in it."""
    if size == 0:
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def pwrite(fd: int, view: memoryview | bytes, offset: int) -> None:
    """Write all of ``view`` at ``offset``."""
    view = memoryview(view)
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def fsync(fd: int) -> None:
    os.fsync(fd)


def fsync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def mkdir(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def rename(source: Path, target: Path) -> None:
    source.rename(target)


def unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
