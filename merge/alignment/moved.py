"""A checkpoint after a group element, lazily: permutations move bytes, the rest is computed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import Whole, reorder, window
from merge.ir.expr import Expr
from merge.ir.orders import Permutation
from merge.symmetry.action import Take, apply, source_of, taken, takes
from merge.symmetry.elements import Element, Scaled
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["moved"]


def moved(checkpoint: Checkpoint, symmetry: Symmetry, element: Element) -> Checkpoint:
    """``checkpoint`` after ``element``: the same function, in other coordinates.

    What is only permuted is a `Reorder` of what it was, bit for bit and in its own type; signs,
    scales and matrices are worked out in the arithmetic's type, a tensor at a time.
    """
    tensors: dict[str, Expr] = {}
    for name in checkpoint.tensors:
        layout = symmetry.tensors[name]
        moves = {g: element[g] for g in layout.groups() if g in element}
        old = checkpoint.tensors[source_of(layout, name, moves)]
        if all(not isinstance(m, Scaled) and m.dtype.kind != "f" for m in moves.values()):
            tensors[name] = _taken(old, takes(symmetry, name, moves))
        else:
            tensors[name] = _computed(old, symmetry, name, moves)
    return replace(checkpoint, tensors=tensors, label=f"aligned({checkpoint.label})")


def _taken(expr: Expr, found: Sequence[Take]) -> Expr:
    """What is taken along each axis, and along several of which one depends on another.

    Axes that depend on one another are seen as one where they are neighbours, so that all is one
    reordering of one view.
    """
    shape = expr.shape
    orders: dict[int, Permutation] = {}
    joined: dict[int, int] = {}  # first axis of several that are one -> the axis behind them
    for take in found:
        first, end = take.axes[0], take.axes[-1] + 1
        if len(take.axes) == 1:
            orders[first] = Permutation.of(take.index)
        elif pair := _stacked(take, shape):
            orders[0], orders[end - 1] = pair
        elif end - first == len(take.axes):
            orders[first], joined[first] = Permutation.of(take.index), end
        else:
            return _everywhere(expr, found)
    view, axes, k = [], [], 0
    while k < len(shape):
        end = joined.get(k, k + 1)
        view.append(math.prod(shape[k:end]))
        axes.append(orders.get(k))
        k = end
    return window(reorder(window(expr, 0, tuple(view)), axes), 0, shape)


def _stacked(take: Take, shape: tuple[int, ...]) -> tuple[Permutation, Permutation] | None:
    """An order of the first axis, and one of another axis for each index of the first; None where
    it is not so."""
    if len(take.axes) != 2 or take.axes[0] != 0:
        return None
    first, second = divmod(take.index.reshape(shape[0], -1), shape[take.axes[1]])
    if (first != first[:, :1]).any():
        return None
    return Permutation.of(first[:, 0]), Permutation.of(second)


def _everywhere(expr: Expr, found: Sequence[Take]) -> Expr:
    """The same for axes that are no neighbours: an order of all elements."""
    import numpy as np

    codes = np.arange(math.prod(expr.shape)).reshape(expr.shape)
    for take in found:
        codes = taken(codes, take)
    line = window(expr, 0, (codes.size,))
    return window(reorder(line, [Permutation.of(codes.reshape(-1))]), 0, expr.shape)


def _computed(expr: Expr, symmetry: Symmetry, name: str, moves: Element) -> Expr:
    """A tensor that is multiplied by signs, scales or matrices as well."""
    layout = symmetry.tensors[name]
    own = source_of(layout, name, moves)
    small = Symmetry(symmetry.groups, {n: symmetry.tensors[n] for n in {name, own}})

    def function(values: Tensor) -> Tensor:
        result: Tensor = apply(small, _One(name, values), moves)[name]
        return result

    return Whole(
        f"moved {_digest(name, moves)}", function, (expr,), (), expr.shape, expr.dtype,
        scratch=2 * math.prod(expr.shape),
    )  # fmt: skip


class _One(Mapping[str, Any]):
    """One tensor under whatever name it is asked for."""

    def __init__(self, name: str, values: Any) -> None:
        self._name, self._values = name, values

    def __getitem__(self, name: str) -> Any:
        return self._values

    def __iter__(self) -> Any:
        return iter([self._name])

    def __len__(self) -> int:
        return 1


def _digest(name: str, moves: Element) -> str:
    """What the moves are, in a word: SHA-256 over the arrays."""
    import numpy as np

    digest = hashlib.sha256(name.encode())
    for group, move in sorted(moves.items()):
        for array in (move.index, move.factor) if isinstance(move, Scaled) else (move,):
            digest.update(f"{group} {array.dtype.kind} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
