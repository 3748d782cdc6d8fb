"""Rows taken from tensors by a table, tile by tile: runs of neighbouring rows are one read."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.engine.operands import Operands
from merge.ir.derived import Gather, Whole
from merge.ir.expr import Apply, Expr, walk

__all__ = ["Rows", "gathered"]

_BLOCK = 1 << 16
"""Elements of the rows that a mean adds up at a time: always the same ones, whatever the tile."""


def gathered(operands: Operands, node: Gather, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of the rows that ``node`` takes, flat."""
    width, table = node.width, node.table
    first, last = start // width, -(-stop // width)
    out = operands.take((last - first) * width)
    rows = out.view(-1, width)
    sources = [Rows(operands, e, width) for e in node.operands]
    begin, end = table.begin[first:last], table.end[first:last]
    count = end - begin
    if not count.all():
        rows[torch.from_numpy(np.flatnonzero(count == 0)).to(out.device)] = 0.0
    alone = np.flatnonzero(count == 1)
    entry = begin[alone]
    for at, operand, row, length in _runs(alone, table.operand[entry], table.row[entry]):
        sources[operand].into(row, rows[at : at + length])
    shared: dict[tuple[int, int], int] = {}
    for at in np.flatnonzero(count > 1).tolist():
        span = (int(begin[at]), int(end[at]))
        if span in shared:
            rows[at] = rows[shared[span]]
        else:
            rows[at] = _mean(sources, node, span, rows[at])
            shared[span] = at
    return out[start - first * width : stop - first * width]


def _mean(sources: list[Rows], node: Gather, span: tuple[int, int], like: Tensor) -> Tensor:
    """The mean of a table's entries, added up in float64 in their order."""
    operand, row = node.table.operand[span[0] : span[1]], node.table.row[span[0] : span[1]]
    total = torch.zeros_like(like, dtype=torch.float64)
    most = max(1, _BLOCK // node.width)
    for _, which, first, length in _runs(np.arange(len(row)), operand, row):
        for at in range(first, first + length, most):
            block = like.new_empty(min(most, first + length - at), node.width)
            sources[which].into(at, block)
            total += block.sum(0, dtype=torch.float64)
    return (total / len(row)).to(like.dtype)


def _runs(
    place: NDArray[np.int64], operand: NDArray[np.int32], row: NDArray[np.int64]
) -> Iterator[tuple[int, int, int, int]]:
    """Neighbouring rows of one operand at neighbouring places: place, operand, row, how many."""
    if not len(place):
        return
    breaks = (np.diff(place) != 1) | (np.diff(row) != 1) | (np.diff(operand) != 0)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    lengths = np.diff(np.concatenate([starts, [len(place)]]))
    yield from zip(
        place[starts].tolist(),
        operand[starts].tolist(),
        row[starts].tolist(),
        lengths.tolist(),
        strict=True,
    )


class Rows:
    """An operand by rows. One that can only be computed whole is computed once for all of them."""

    def __init__(self, operands: Operands, expr: Expr, width: int) -> None:
        self._operands, self._expr, self._width = operands, expr, width
        self._whole = any(
            isinstance(n, Whole)
            or (isinstance(n, Apply) and n.method.local == "tensor" and not n.method.coefficients)
            for n in walk(expr)
        )

    def into(self, row: int, out: Tensor) -> None:
        """Copy as many rows as ``out`` has, from ``row`` on."""
        start, stop = row * self._width, row * self._width + out.numel()
        if self._whole:
            every = self._operands.value(self._expr, 0, math.prod(self._expr.shape))
            out.copy_(every[start:stop].view_as(out))
        else:
            self._operands.into(self._expr, start, stop, out.view(-1))
