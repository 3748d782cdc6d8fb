"""One weight file of a plan as a sink that needs no disk: filled in memory, then given away whole.

The memory is an anonymous file of Linux (``memfd``), which has a path in this process and counts
as its memory; elsewhere it is a temporary file, removed when it is closed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merge.errors import SinkError
from merge.plan.model import Chunk, Plan, Step, human_bytes
from merge.write import ops
from merge.write.chunk import ChunkFile
from merge.write.manifest import FileEntry, weight_entries

__all__ = ["Shard", "held_in_memory"]

_FDS = Path("/proc/self/fd")


def held_in_memory() -> bool:
    """Whether shards are held in memory on this system, not in a temporary file."""
    return hasattr(os, "memfd_create") and _FDS.is_dir()


class Shard:
    """The only weight file of ``part``, to be filled. A context: it is gone when that ends."""

    def __init__(self, part: Plan) -> None:
        (self.file,) = part.files
        self._part = part
        self._digests: dict[tuple[int, int], str] = {}
        self._fd: int | None = None
        self._removed: Path | None = None

    def __enter__(self) -> Shard:
        with _errors(self.file.name, self.file.size):
            if held_in_memory():
                self._fd = os.memfd_create(Path(self.file.name).name, os.MFD_CLOEXEC)
            else:
                self._fd, path = tempfile.mkstemp(prefix="hf-merge-", suffix=".safetensors")
                self._removed = Path(path)
            try:
                ops.allocate(self._fd, self.file.size)
                ops.pwrite(self._fd, self.file.header, 0)
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._removed is not None:
            self._removed.unlink(missing_ok=True)
            self._removed = None

    @property
    def path(self) -> Path:
        """A path by which this process, and no other, can read the file."""
        return _FDS / str(self._open_fd()) if self._removed is None else self._removed

    def entry(self) -> FileEntry:
        """The file's entry in a manifest; all its chunks are there."""
        return weight_entries(self._part, self._digests)[self.file.name]

    # -- the engine's side -----------------------------------------------------------------------
    def finished(self, chunk: Chunk) -> bool:
        return (chunk.step, chunk.number) in self._digests

    @contextmanager
    def open(self, step: Step, chunk: Chunk) -> Iterator[ChunkFile]:
        with _errors(self.file.name, self.file.size):
            writer = ChunkFile(self._open_fd(), step, chunk)
            yield writer
            self._digests[chunk.step, chunk.number] = writer.finish()

    def _open_fd(self) -> int:
        assert self._fd is not None, "the shard is not open"
        return self._fd


@contextmanager
def _errors(file: str, size: int) -> Iterator[None]:
    """Turn an OSError into a SinkError that says what did not fit where."""
    try:
        yield
    except OSError as error:
        where = "memory" if held_in_memory() else f"the temporary folder {tempfile.gettempdir()}"
        raise SinkError(
            f"a weight file cannot be held in {where}: {error.strerror or error}",
            file=file,
            expected=f"room for {human_bytes(size)}",
            do="make smaller files, such as --shard-size 1GB, and run the same command again",
        ) from error
