"""A tensor in a new order of its coordinates, tile by tile.

Rows are read where they come from, neighbours in one read; within a row the last order is a
selection in memory. Only elements are moved, so any tile and any thread give the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.ir.derived import Reorder

__all__ = ["reordered"]


def reordered(
    node: Reorder,
    start: int,
    stop: int,
    take: Callable[[int], Tensor],
    into: Callable[[int, Tensor], None],
) -> Tensor:
    """Elements ``start`` to ``stop`` of ``node``, flat.

    take: a buffer of so many elements. into: fills a tensor with the operand's elements from one
    on.
    """
    width = node.width
    first, last = start // width, -(-stop // width)
    rows = take((last - first) * width).view(-1, width)
    numbers = np.arange(first, last)
    outer = node.shape[: node.last + (not node.picks)]
    for at, ahead, length in _spans(_sources(node, outer, numbers) - numbers):
        into((first + at + ahead) * width, rows[at : at + length].view(-1))
    if node.picks:
        rows = _picked(node, outer, numbers, rows, take(rows.numel()).view_as(rows))
    return rows.reshape(-1)[start - first * width : stop - first * width]


def _sources(node: Reorder, outer: tuple[int, ...], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The operand's row for each of ``rows``, which are numbered over the axes ``outer``."""
    if not any(order is not None for order in node.axes[: len(outer)]):
        return rows
    at = np.unravel_index(rows, outer)
    found = []
    for index, order in zip(at, node.axes, strict=False):
        if order is None:
            found.append(index)
        else:
            found.append(order.index[at[0], index] if order.stacked else order.index[index])
    return np.ravel_multi_index(tuple(found), outer).astype(np.int64)


def _picked(
    node: Reorder, outer: tuple[int, ...], numbers: NDArray[np.int64], rows: Tensor, out: Tensor
) -> Tensor:
    """Rows with their last order; of a stack of orders, each row's own."""
    order = node.axes[node.last]
    assert order is not None
    if not order.stacked:
        _pick(order.index, rows, out)
        return out
    part = numbers // (math.prod(outer) // outer[0])  # the index of the first axis
    for at, which, length in _spans(part):
        _pick(order.index[which], rows[at : at + length], out[at : at + length])
    return out


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _pick(index: NDArray[np.int64], rows: Tensor, out: Tensor) -> None:
    """Move the coordinates of rows, each coordinate one element or several, whatever the type."""
    bits = _BITS[rows.element_size()]
    shape = (len(rows), len(index), -1)
    chosen = torch.from_numpy(index.copy()).to(rows.device)
    if rows.shape[1] == len(index):  # several times as fast as selecting
        torch.gather(rows.view(bits), 1, chosen.expand(len(rows), -1), out=out.view(bits))
    else:
        torch.index_select(rows.view(bits).view(shape), 1, chosen, out=out.view(bits).view(shape))


def _spans(values: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Runs of one value: where, the value, how long."""
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [(a, int(values[a]), b - a) for a, b in itertools.pairwise(bounds)]
