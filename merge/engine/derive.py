"""Evaluate the nodes that make tensors of stored ones: parts, joins, rows, orders, products."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from merge.engine.operands import Operands
from merge.engine.reorder import reordered
from merge.engine.rows import Rows, gathered
from merge.ir.derived import (
    BlockScaled,
    Cast,
    Concat,
    Derived,
    Gather,
    LowRank,
    Reorder,
    Whole,
    Window,
)
from merge.ir.dtypes import DType
from merge.ir.expr import Expr, Read

__all__ = ["copied", "derive", "parts_of"]

_ROWS = 1 << 16
"""Elements of the rows that a product computes at a time: always the same ones, so that a tile's
bits do not depend on where it begins."""


def copied(expr: Expr, dtype: DType) -> bool:
    """Whether elements of ``expr`` are stored ones, put elsewhere: then bytes are moved."""
    if expr.dtype != dtype or not isinstance(expr, Read | Window | Concat | Reorder):
        return False
    return isinstance(expr, Read) or all(copied(e, dtype) for e in expr.operands)


def parts_of(node: Concat, start: int, stop: int) -> Iterator[tuple[Expr, int, int]]:
    """The operands that elements ``start`` to ``stop`` come from, each with its own span."""
    at = 0
    for part in node.operands:
        end = at + math.prod(part.shape)
        if max(at, start) < min(end, stop):
            yield part, max(at, start) - at, min(end, stop) - at
        at = end


def derive(operands: Operands, node: Derived, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of the node's value, flat, in the compute type."""
    if isinstance(node, Cast):
        return operands.value(node.operands[0], start, stop)
    if isinstance(node, Window):
        return operands.value(node.operands[0], node.start + start, node.start + stop)
    if isinstance(node, Concat):
        parts = [operands.value(e, a, b) for e, a, b in parts_of(node, start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if isinstance(node, Gather):
        return gathered(operands, node, start, stop)
    if isinstance(node, Reorder):
        return reordered(node, start, stop, operands.take, Rows(operands, node.operands[0], 1).into)
    if isinstance(node, LowRank):
        return _product(operands, node, start, stop)
    if isinstance(node, BlockScaled):
        return _scaled(operands, node, start, stop)
    numel = math.prod(node.shape)
    if stop - start < numel:
        return operands.value(node, 0, numel)[start:stop]
    return _called(operands, node)


def _called(operands: Operands, node: Whole) -> Tensor:
    given = [operands.whole(e) for e in node.operands]
    result: Tensor = node.function(*given, **dict(node.parameters))
    return result.reshape(-1)


def _product(operands: Operands, node: LowRank, start: int, stop: int) -> Tensor:
    """Rows of B A. Each block of rows is one product of the same shapes, whoever asks for it."""
    left, right = (operands.held(e) for e in node.operands)
    left, right = left.reshape(-1, node.rank), right.reshape(node.rank, -1)
    if node.transposed:
        left, right = right.T, left.T
    columns = right.shape[1]
    rows = max(1, _ROWS // columns)
    out = operands.take(stop - start)
    for first in range(start // columns // rows * rows, -(-stop // columns), rows):
        block = (left[first : first + rows] @ right).reshape(-1)
        at = first * columns
        begin, end = max(start, at), min(stop, at + block.numel())
        out[begin - start : end - start] = block[begin - at : end - at]
    return out


def _scaled(operands: Operands, node: BlockScaled, start: int, stop: int) -> Tensor:
    """Codes times scales: whole rows a block at a time, a part of a row by its own factors."""
    codes, scales = node.operands
    high, wide = node.block
    rows, columns = node.shape[-2:]
    table = operands.held(scales).reshape(-1, scales.shape[-1])
    values, out = operands.value(codes, start, stop), operands.take(stop - start)
    at = start
    while at < stop:
        row, column = divmod(at, columns)
        whole = (stop - at) // columns if column == 0 else 0
        end = at + whole * columns if whole else min(stop, (row + 1) * columns)
        numbers = torch.arange(row, row + max(1, whole), device=table.device)
        factors = table[numbers // rows * -(-rows // high) + numbers % rows // high]
        given, made = values[at - start : end - start], out[at - start : end - start]
        if whole:
            _times_blocks(given.view(whole, columns), factors, wide, made.view(whole, columns))
        else:
            spread = factors[0].repeat_interleave(wide)[column : column + end - at]
            torch.mul(given, spread, out=made)
        at = end
    return out


def _times_blocks(rows: Tensor, factors: Tensor, wide: int, out: Tensor) -> None:
    """Each run of ``wide`` elements of a row times its factor; the last run may be shorter."""
    runs = rows.shape[1] // wide
    full = runs * wide
    if runs:
        given, made = (t[:, :full].view(-1, runs, wide) for t in (rows, out))
        torch.mul(given, factors[:, :runs, None], out=made)
    if full < rows.shape[1]:
        torch.mul(rows[:, full:], factors[:, runs:], out=out[:, full:])
