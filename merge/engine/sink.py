"""What the engine needs of a place to write to; `merge.write` has the real ones."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from merge.plan.model import Chunk, Step

__all__ = ["ChunkWriter", "Sink"]


class ChunkWriter(Protocol):
    """One chunk of an output tensor, filled from its beginning."""

    def write(self, view: memoryview) -> None:
        """Append bytes."""


class Sink(Protocol):
    """Takes the chunks of a plan, in any order, from any thread."""

    def finished(self, chunk: Chunk) -> bool:
        """Whether an earlier run has written this chunk already, proved by its digest."""

    def open(self, step: Step, chunk: Chunk) -> AbstractContextManager[ChunkWriter]:
        """A writer for one chunk, which counts as written when the context ends without error."""
