"""Sums over tensors as a sink: nothing is kept but a number for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from merge.plan.model import Chunk, Plan, Step

__all__ = ["SquaresSink"]


class SquaresSink:
    """The sum of squares of each float32 or float64 tensor of a plan; 0 for other types."""

    def __init__(self, plan: Plan) -> None:
        self._names = [s.output.name for s in plan.steps]
        self._sums: dict[tuple[int, int], float] = {}

    def finished(self, chunk: Chunk) -> bool:
        return False

    @contextmanager
    def open(self, step: Step, chunk: Chunk) -> Iterator[_Writer]:
        name = step.output.dtype.name
        writer = _Writer(np.dtype(name) if name in ("float32", "float64") else None)
        yield writer
        self._sums[chunk.step, chunk.number] = math.fsum(writer.sums)

    @property
    def squares(self) -> dict[str, float]:
        """By tensor; added in order, whichever thread was first."""
        parts: dict[str, list[float]] = {name: [] for name in self._names}
        for (step, _), value in sorted(self._sums.items()):
            parts[self._names[step]].append(value)
        return {name: math.fsum(values) for name, values in parts.items()}


class _Writer:
    __slots__ = ("dtype", "sums")

    def __init__(self, dtype: np.dtype[np.floating] | None) -> None:
        self.dtype = dtype
        self.sums: list[float] = []

    def write(self, view: memoryview) -> None:
        if self.dtype is not None:
            values = np.frombuffer(view, self.dtype).astype(np.float64)
            self.sums.append(float(values @ values))
