"""Signs, scales and matrices on the blocks of a tensor, before anything is permuted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from merge.symmetry.axes import Axis, Factor
from merge.symmetry.elements import Element, Scaled, matrix_of, spread
from merge.symmetry.symmetry import Layout, Symmetry

__all__ = ["Stack", "multiplied", "of_parents"]

Stack: TypeAlias = tuple[str, int | None]
"""The group that counts the slices of a stacked tensor, and the slice's old number."""


def of_parents(
    symmetry: Symmetry, values: Any, names: Sequence[str | None], k: int, stack: Stack
) -> tuple[Any, list[int]]:
    """A move's array with the stack's number put in, and the axes of the block of the others."""
    dims: list[int] = []
    for parent in symmetry.groups[names[k] or ""].per:
        if parent == stack[0]:
            values = values[(slice(None),) * len(dims) + (stack[1],)]
        else:
            dims.append(names.index(parent))
    return values, [*dims, k]


def multiplied(symmetry: Symmetry, tensor: Any, layout: Layout, moves: Element) -> Any:
    """The tensor after the factors and matrices of ``moves``, before anything is permuted."""
    out = tensor * 1  # a copy, in numpy and in torch
    _multiply(symmetry, out, list(layout.axes), moves, (layout.stack, layout.member))
    return out


def _multiply(
    symmetry: Symmetry, out: Any, axes: list[Axis | Factor], moves: Element, stack: Stack
) -> None:
    """Multiply in place, block by block."""
    for k, axis in enumerate(axes):
        if not isinstance(axis, Axis):
            continue
        at = 0
        for product in axis.parts:
            size = math.prod(f.size for f in product)
            place = (slice(None),) * k + (slice(at, at + size),)
            piece = out[place] * 1
            inner = (*piece.shape[:k], *(f.size for f in product), *piece.shape[k + 1 :])
            dims = [*axes[:k], *product, *axes[k + 1 :]]
            moved = piece.reshape(inner)
            _multiply(symmetry, moved, dims, moves, stack)
            out[place] = moved.reshape(piece.shape)
            at += size
        return
    factors = [f for f in axes if isinstance(f, Factor)]
    names = [f.group for f in factors]
    for k, factor in enumerate(factors):
        move = moves.get(factor.group or "")
        if move is None or (factor.form == "|" and isinstance(move, Scaled)):
            continue
        if isinstance(move, Scaled):
            out *= _like(out, _factors(symmetry, move, factor, names, k, stack, out.ndim))
        else:
            matrix = matrix_of(move, factor.size)
            _rotate(symmetry, out, matrix, factor, names, k, stack)


def _factors(
    symmetry: Symmetry,
    move: Scaled,
    factor: Factor,
    names: Sequence[str | None],
    k: int,
    stack: Stack,
    ndim: int,
) -> Any:
    """A factor for each old position: ``old[p[i]]`` is multiplied by ``factor[i]``."""
    import numpy as np

    values = np.empty_like(move.factor)
    np.put_along_axis(values, move.index, move.factor, -1)
    if factor.form == "*":
        values = 1.0 / values
    values, dims = of_parents(symmetry, values, names, k, stack)
    return spread(values, dims, ndim)


def _rotate(
    symmetry: Symmetry,
    out: Any,
    matrix: Any,
    factor: Factor,
    names: Sequence[str | None],
    k: int,
    stack: Stack,
) -> None:
    """Multiply axis k by matrices: the row of coordinates with the transposed matrix."""
    import numpy as np

    turned = np.linalg.inv(matrix) if factor.form == "*" else np.swapaxes(matrix, -1, -2)
    parents = list(symmetry.groups[factor.group or ""].per)
    held = [p for p in parents if p != stack[0]]
    if stack[0] in parents:
        turned = np.take(turned, stack[1] or 0, axis=parents.index(stack[0]))
    dims = [names.index(p) for p in held]
    # axes: k comes last, and one that no matrix depends on before it, so that it is one product
    free = [a for a in range(out.ndim) if a != k and a not in dims]
    long = max(free, key=lambda a: out.shape[a], default=None)
    batch = [a for a in range(out.ndim) if a not in (k, long)]
    place = {a: n for n, a in enumerate(batch)}
    wide = spread(turned, [place[a] for a in dims], len(batch), tail=2)
    for at in np.ndindex(*(out.shape[a] for a in batch)):
        where = tuple(at[place[a]] if a in place else slice(None) for a in range(out.ndim))
        one = wide[tuple(min(i, n - 1) for i, n in zip(at, wide.shape, strict=False))]
        rows = out[where]  # (long, n), (n, long) or (n,)
        if long is not None and long > k:
            out[where] = (rows.swapaxes(0, 1) @ _like(out, one)).swapaxes(0, 1)
        else:
            out[where] = rows @ _like(out, one)


def _like(tensor: Any, values: Any) -> Any:
    """numpy values as an array of the tensor's library and type."""
    if hasattr(tensor, "new_tensor"):
        return tensor.new_tensor(values)
    return values.astype(tensor.dtype)
