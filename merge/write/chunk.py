"""The bytes of one chunk on their way into a file: put at their place, digested on the way."""

from __future__ import annotations

from blake3 import blake3

from merge.plan.model import Chunk, Step
from merge.write import ops

__all__ = ["ChunkFile", "byte_range"]


def byte_range(step: Step, chunk: Chunk) -> tuple[int, int]:
    """The bytes of the step's file that a chunk fills: first, and one past the last."""
    bits = step.output.dtype.bits
    return step.offset + chunk.start * bits // 8, step.offset + chunk.stop * bits // 8


class ChunkFile:
    """Appends to one chunk's place in a file; digests what it writes while that is in the cache."""

    __slots__ = ("at", "digest", "end", "fd", "what")

    def __init__(self, fd: int, step: Step, chunk: Chunk) -> None:
        self.fd, self.what = fd, step.output
        self.at, self.end = byte_range(step, chunk)
        self.digest = blake3()

    def write(self, view: memoryview) -> None:
        self.digest.update(view)
        ops.pwrite(self.fd, view, self.at)
        self.at += len(view)

    def finish(self) -> str:
        """The digest of the chunk, in hex, which is whole."""
        if self.at != self.end:
            raise AssertionError(f"{self.what}: wrote to byte {self.at}, not {self.end}")
        return self.digest.hexdigest()
