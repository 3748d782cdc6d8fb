"""What an element does to tensors: an index for each axis, or sums over blocks for matrices.

Tensors are numpy arrays or torch tensors alike; only methods that both have are called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.symmetry.axes import Axis, Factor, factors_of
from merge.symmetry.elements import Element, Scaled, checked, is_matrix, spread
from merge.symmetry.multiply import Stack, multiplied, of_parents
from merge.symmetry.symmetry import Layout, Symmetry

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Take", "apply", "source_of", "takes"]


@dataclass(frozen=True, slots=True, eq=False)
class Take:
    """``new = old`` with the positions ``index`` of ``axes`` taken, these as one axis row-major."""

    axes: tuple[int, ...]
    index: NDArray[Any]


def apply(symmetry: Symmetry, tensors: Mapping[str, Any], element: Element) -> dict[str, Any]:
    """The tensors after ``element``, in their order; those that it does not touch are passed on.

    Permutations move values bit for bit. Signs, scales and matrices are worked out in the type of
    the tensor; integers and flags are only ever permuted.
    """
    out: dict[str, Any] = {}
    checked(symmetry, element)
    for name in tensors:
        layout = symmetry.tensors[name]
        source = tensors[source_of(layout, name, element)]
        touched = [g for g in layout.groups() if g in element]
        continuous = {
            g: element[g]
            for g in touched
            if isinstance(element[g], Scaled) or is_matrix(element[g])
        }
        if continuous:
            old = symmetry.tensors[source_of(layout, name, element)]
            source = multiplied(symmetry, source, old, continuous)
        for take in takes(symmetry, name, element):
            source = taken(source, take)
        out[name] = source
    return out


def source_of(layout: Layout, name: str, element: Element) -> str:
    """The tensor whose values become those of ``name``: another one where experts change places."""
    move = element.get(layout.stack) if layout.stack else None
    if move is None or isinstance(move, Scaled):
        return name
    return layout.siblings[int(move[layout.member])]


def takes(symmetry: Symmetry, name: str, element: Element) -> list[Take]:
    """How the element permutes the tensor: what is taken along which axes, one after the other.

    One take for each axis that is moved. Axes are taken together where one depends on the other, as
    the units of stacked experts on the number of the expert.
    """
    import numpy as np

    layout = symmetry.tensors[name]
    out = []
    for together in _coupled(symmetry, layout, element):
        axes = [layout.axes[k] for k in together]
        length = math.prod(layout.shape[k] for k in together)
        codes = np.arange(length).reshape([layout.shape[k] for k in together])
        member = None if not layout.stack else _old_member(layout, element)
        index = _permuted(symmetry, codes, axes, element, (layout.stack, member)).reshape(-1)
        if not np.array_equal(index, np.arange(length)):
            out.append(Take(together, index))
    return out


def taken(tensor: Any, take: Take) -> Any:
    """The tensor after one take.

    >>> import numpy as np
    >>> taken(np.array([[1, 2], [3, 4]]), Take((1,), np.array([1, 0]))).tolist()
    [[2, 1], [4, 3]]
    """
    axes = take.axes
    if len(axes) == 1:
        return tensor[(slice(None),) * axes[0] + (take.index,)]
    moved = tensor
    swaps = [(place, axis) for place, axis in enumerate(axes) if place != axis]
    for place, axis in swaps:  # axes rise, so each swap leaves the later ones where they are
        moved = moved.swapaxes(place, axis)
    shape = tuple(moved.shape)
    flat = moved.reshape((-1, *shape[len(axes) :]))[take.index]
    moved = flat.reshape(shape)
    for place, axis in reversed(swaps):
        moved = moved.swapaxes(place, axis)
    return moved


def _coupled(symmetry: Symmetry, layout: Layout, element: Element) -> list[tuple[int, ...]]:
    """The axes that the element moves, those together of which one depends on the other."""
    held = [{f.group for f in factors_of(axis) if f.group} for axis in layout.axes]
    sets: list[set[int]] = []
    for k, groups in enumerate(held):
        moving = [g for g in groups if g in element]
        if not moving:
            continue
        parents = {p for g in moving for p in symmetry.groups[g].per}
        here = {k} | {m for m in range(len(held)) if parents & (held[m] - groups)}
        for other in [s for s in sets if s & here]:
            sets.remove(other)
            here |= other
        sets.append(here)
    return sorted(tuple(sorted(s)) for s in sets)


def _old_member(layout: Layout, element: Element) -> int:
    move = element.get(layout.stack)
    return layout.member if move is None or isinstance(move, Scaled) else int(move[layout.member])


def _permuted(
    symmetry: Symmetry, codes: Any, axes: Sequence[Axis | Factor], element: Element, stack: Stack
) -> Any:
    """``codes`` permuted along axes; sums are taken apart, products become axes of their own."""
    import numpy as np

    for k, axis in enumerate(axes):
        if not isinstance(axis, Axis):
            continue
        pieces, at = [], 0
        for product in axis.parts:
            size = math.prod(f.size for f in product)
            piece = codes[(slice(None),) * k + (slice(at, at + size),)]
            inner = (*piece.shape[:k], *(f.size for f in product), *piece.shape[k + 1 :])
            dims = [*axes[:k], *product, *axes[k + 1 :]]
            moved = _permuted(symmetry, piece.reshape(inner), dims, element, stack)
            pieces.append(moved.reshape(piece.shape))
            at += size
        return np.concatenate(pieces, axis=k)
    names = [f.group for f in axes if isinstance(f, Factor)]
    for k in sorted(range(len(names)), key=lambda k: -_depth(symmetry, names[k])):
        move = element.get(names[k] or "")
        if move is None or is_matrix(move):
            continue
        index = move.index if isinstance(move, Scaled) else move
        index, along = of_parents(symmetry, index, names, k, stack)
        codes = np.take_along_axis(codes, spread(index, along, codes.ndim), k)
    return codes


def _depth(symmetry: Symmetry, name: str | None) -> int:
    return len(symmetry.groups[name].per) if name else 0
