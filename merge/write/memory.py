"""A state dict as a sink: the result stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from merge.plan.model import Chunk, Plan, Step

__all__ = ["MemorySink"]


class MemorySink:
    """Allocates every output tensor once; ``tensors`` is the state dict."""

    def __init__(self, plan: Plan) -> None:
        self.tensors = {
            s.output.name: torch.empty(s.output.shape, dtype=getattr(torch, s.output.dtype.name))
            for s in plan.steps
        }
        self._bytes = {
            name: t.reshape(-1).view(torch.uint8).numpy().data for name, t in self.tensors.items()
        }

    def finished(self, chunk: Chunk) -> bool:
        return False

    @contextmanager
    def open(self, step: Step, chunk: Chunk) -> Iterator[_Writer]:
        yield _Writer(self._bytes[step.output.name], chunk.start * step.output.dtype.bits // 8)


class _Writer:
    __slots__ = ("at", "whole")

    def __init__(self, whole: memoryview, at: int) -> None:
        self.whole, self.at = whole, at

    def write(self, view: memoryview) -> None:
        self.whole[self.at : self.at + len(view)] = view
        self.at += len(view)
