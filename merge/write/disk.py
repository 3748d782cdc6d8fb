"""What goes wrong with a disk, as an error that says where, and how much room there is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from merge.errors import SinkError
from merge.plan.model import human_bytes

__all__ = ["disk_errors"]


@contextmanager
def disk_errors(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Turn an OSError of writing into a SinkError that says where and how much room there is."""
    try:
        yield
    except OSError as error:
        free = None
        with suppress(OSError):
            existing = next(p for p in (path, *path.parents) if p.exists())
            free = f"{human_bytes(shutil.disk_usage(existing).free)} free on that disk"
        raise SinkError(
            f"writing failed: {error.strerror or error}",
            file=error.filename or path,
            tensor=tensor,
            found=free,
            do="nothing is lost: mend the cause and run the same command again, it will resume",
        ) from error
