"""Tensors made of stored ones before any merging: parts, joins, rows, orders, products, codes.

Each is a node of the IR beside those of `merge.ir.expr`. `window`, `concat`, `gather` and `reorder`
make the simplest equal expression: taking a stack of experts apart and stacking it again is no work
at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.ir.dtypes import DType, promote
from merge.ir.orders import Permutation
from merge.ir.rows import RowTable

if TYPE_CHECKING:
    from merge.ir.expr import Expr, Parameter

__all__ = [
    "BlockScaled",
    "Cast",
    "Concat",
    "Derived",
    "Gather",
    "LowRank",
    "Reorder",
    "Whole",
    "Window",
    "cast",
    "concat",
    "gather",
    "held_elements",
    "reorder",
    "window",
]


@dataclass(frozen=True, slots=True)
class Cast:
    """The operand as if it were stored as ``dtype``, such as a float32 adapter's for its base.

    Nothing is rounded but the result of a tensor.
    """

    operands: tuple[Expr]
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.operands[0].shape


@dataclass(frozen=True, slots=True)
class Window:
    """A run of the operand's elements from ``start`` on, in row-major order, seen as ``shape``.

    One expert of a stack of them, or the gate's half of a fused gate and up projection.
    """

    operands: tuple[Expr]
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        return self.operands[0].dtype


@dataclass(frozen=True, slots=True)
class Concat:
    """The operands one after another in memory, seen as ``shape``: joined along the first axis."""

    operands: tuple[Expr, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        return promote(*(e.dtype for e in self.operands))


@dataclass(frozen=True, slots=True)
class Gather:
    """Rows of the operands, taken by a table: a vocabulary put in a new order.

    Rows lie along the first axis; those of a (1, n) tensor may be its n elements. All operands have
    rows of one shape.
    """

    operands: tuple[Expr, ...]
    table: RowTable
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        return promote(*(e.dtype for e in self.operands))

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape) // max(1, self.table.count)


_NARROW = 64
"""Elements: a read of fewer is dearer than reading the whole row and picking from it."""

_WIDE = 1 << 18
"""Elements of the longest row that is read whole though a part of it would do: a tile."""


@dataclass(frozen=True, slots=True)
class Reorder:
    """The operand with the coordinates of some axes in a new order: units moved, values kept.

    Element (i, j, ...) is element (a[i], b[j], ...) of the operand, for the orders a, b, ... of the
    axes; None is an axis that stays. A stack of orders takes the one at ``i``.
    """

    operands: tuple[Expr]
    axes: tuple[Permutation | None, ...]

    @property
    def dtype(self) -> DType:
        return self.operands[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.operands[0].shape

    @property
    def last(self) -> int:
        """The last axis that moves. What lies behind it stays together."""
        return max(i for i, order in enumerate(self.axes) if order is not None)

    @property
    def picks(self) -> bool:
        """Whether the last axis is picked from rows in memory, not read piece by piece."""
        behind = math.prod(self.shape[self.last + 1 :])
        return behind < _NARROW or self.shape[self.last] * behind <= _WIDE

    @property
    def width(self) -> int:
        """Elements that are read in one piece at least."""
        return math.prod(self.shape[self.last + (not self.picks) :])


@dataclass(frozen=True, slots=True)
class LowRank:
    """The product B A of two thin matrices, (m, rank) and (rank, n), or its transpose.

    The operands are B and A; axes of a convolution's kernel count as columns of A. Computed a few
    rows at a time, never whole. ``dtype`` is that of the weight which the product is added to.
    """

    operands: tuple[Expr, Expr]
    rank: int
    transposed: bool
    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """Codes times a scale for each block: how weights are stored in eight bits.

    The operands are codes (..., rows, columns) and scales (..., ceil(rows / block[0]),
    ceil(columns / block[1])); element (.., i, j) is codes[.., i, j] times
    scales[.., i // block[0], j // block[1]].
    """

    operands: tuple[Expr, Expr]
    block: tuple[int, int]
    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class Whole:
    """A function of whole tensors, for what cannot be computed from a part of them.

    It gets its operands in their shapes: floats in the arithmetic's type, others as stored.
    scratch: elements that it holds besides operands and result. name: what the function is called;
    with the parameters it stands for the function's identity.
    """

    name: str
    function: Callable[..., Any]
    operands: tuple[Expr, ...]
    parameters: tuple[tuple[str, Parameter], ...]
    shape: tuple[int, ...]
    dtype: DType
    scratch: int = 0


Derived = Cast | Window | Concat | Gather | Reorder | LowRank | BlockScaled | Whole


def held_elements(node: Derived) -> int:
    """Elements of whole operands that are kept as long as their tensor is worked on."""
    if isinstance(node, LowRank):
        return sum(math.prod(e.shape) for e in node.operands)
    return math.prod(node.operands[1].shape) if isinstance(node, BlockScaled) else 0


def cast(operand: Expr, dtype: DType) -> Expr:
    """The operand as if it were stored as ``dtype``: itself, where it is."""
    return operand if operand.dtype == dtype else Cast((operand,), dtype)


def window(operand: Expr, start: int, shape: tuple[int, ...]) -> Expr:
    """The simplest expression for a run of ``operand``: the operand itself, or a part of it.

    Raises ValueError where the run does not lie in the operand.
    """
    numel, size = math.prod(shape), math.prod(operand.shape)
    if not 0 <= start <= start + numel <= size:
        raise ValueError(f"elements {start} to {start + numel} of {size}")
    if numel == size and operand.shape == shape:
        return operand
    if isinstance(operand, Window):
        return window(operand.operands[0], operand.start + start, shape)
    if isinstance(operand, Concat):
        covered, at = [], 0
        for part in operand.operands:
            end = at + math.prod(part.shape)
            if at <= start and start + numel <= end and numel:
                return window(part, start - at, shape)
            if start <= at and end <= start + numel:
                covered.append(part)
            at = end
        if numel and sum(math.prod(p.shape) for p in covered) == numel:
            return concat(covered, shape)
    return Window((operand,), start, shape)


def concat(parts: Sequence[Expr], shape: tuple[int, ...]) -> Expr:
    """The simplest expression for parts put together; neighbouring parts of one tensor are one.

    Raises ValueError where the parts are not as many elements as the shape.
    """
    joined: list[Expr] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Concat):
            joined += part.operands
        elif (
            isinstance(last, Window)
            and isinstance(part, Window)
            and part.operands == last.operands
            and part.start == last.start + math.prod(last.shape)
        ):
            both = math.prod(last.shape) + math.prod(part.shape)
            joined[-1] = window(last.operands[0], last.start, (both,))
        else:
            joined.append(part)
    if sum(math.prod(p.shape) for p in joined) != math.prod(shape):
        raise ValueError(f"{sum(math.prod(p.shape) for p in joined)} elements for {shape}")
    if len(joined) > 1:
        return Concat(tuple(joined), shape)
    return window(joined[0], 0, shape) if joined[0].shape != shape else joined[0]


def gather(operands: Sequence[Expr], table: RowTable, shape: tuple[int, ...]) -> Expr:
    """The simplest expression for rows taken by ``table``; operands without a row in it go.

    Raises PlanError where the table asks for a row that an operand does not have, ValueError where
    rows are of different sizes.
    """
    shapes = [shape, *(e.shape for e in operands)]
    columns = table.count == shape[-1] and all(s[:-1] == (1,) for s in shapes)  # of one element
    rows = [(s[-1], ()) if columns else (s[0], s[1:]) for s in shapes]
    if any(r[1] != rows[0][1] for r in rows) or rows[0][0] != table.count:
        raise ValueError(f"{table.count} rows for {shape} of {[e.shape for e in operands]}")
    counts = [count for count, _ in rows[1:]]
    table.check(counts)
    same = table.identity_of(counts)
    if same is not None and operands[same].shape == shape:
        return operands[same]
    used = table.used() or [0]  # a tensor of zeros still needs the type of an operand
    return Gather(tuple(operands[i] for i in used), table.over(used), shape)


def reorder(operand: Expr, axes: Sequence[Permutation | None]) -> Expr:
    """The simplest expression for ``operand`` in a new order: two orders are one, none is nothing.

    Raises ValueError where an order does not have the size of its axis.
    """
    shape = operand.shape
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} orders for {list(shape)}")
    for axis, order in enumerate(axes):
        if order is None:
            continue
        if order.size != shape[axis] or (
            order.stacked and (axis == 0 or len(order.index) != shape[0])
        ):
            raise ValueError(f"an order of {order.index.shape} for axis {axis} of {list(shape)}")
    if isinstance(operand, Reorder):
        pairs = zip(axes, operand.axes, strict=True)
        return reorder(operand.operands[0], [_after(a, b, axes[0]) for a, b in pairs])
    moved = tuple(None if o is None or o.is_identity() else o for o in axes)
    return operand if not any(moved) else Reorder((operand,), moved)


def _after(
    order: Permutation | None, earlier: Permutation | None, first: Permutation | None
) -> Permutation | None:
    """Two orders of one axis as one; ``first``: the later order of the tensor's first axis."""
    if order is None and earlier is not None and earlier.stacked and first is not None:
        return Permutation.of(earlier.index[first.index])
    if order is None or earlier is None:
        return order or earlier
    return order.of_earlier(earlier, first)
