"""Group elements: what is done to each group of a symmetry; random ones, inverses, products.

An element maps names of groups to moves; groups that it leaves out stay as they are. A move of n
coordinates is one of

* an integer array p, a permutation: ``new[i] = old[p[i]]``;
* `Scaled`: a permutation and non-zero factors: ``new[i] = factor[i] * old[p[i]]``;
* a float array M, an invertible matrix: ``new = M @ old``.

A group that depends on others (``per``) has one move for each index of theirs, on leading axes of
the arrays: ``p`` of shape (parents..., n). These indices are the *old* ones: a group within
key/value head 3 goes by ``p[3]``, wherever head 3 itself goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from merge.errors import PlanError
from merge.symmetry.symmetry import Group, Symmetry

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Element",
    "Move",
    "Scaled",
    "checked",
    "compose",
    "identity",
    "inverse",
    "is_matrix",
    "matrix_of",
    "random_element",
    "shape_of",
    "spread",
]


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """A permutation and a factor for each coordinate: signs, or scales."""

    index: NDArray[Any]
    factor: NDArray[Any]


Move: TypeAlias = "NDArray[Any] | Scaled"
Element: TypeAlias = Mapping[str, Move]


def identity(symmetry: Symmetry) -> dict[str, Move]:
    """The permutation of every group that may move that leaves it as it is."""
    import numpy as np

    moving = {n: g for n, g in symmetry.groups.items() if g.flags}
    return {n: np.broadcast_to(np.arange(g.size), shape_of(symmetry, n)) for n, g in moving.items()}


def shape_of(symmetry: Symmetry, name: str) -> tuple[int, ...]:
    """Shape of the group's permutation: the sizes of its parents, then its own."""
    group = symmetry.groups[name]
    return (*(symmetry.groups[p].size for p in group.per), group.size)


def random_element(symmetry: Symmetry, seed: int = 0, kinds: str = "P") -> dict[str, Move]:
    """A random element in which each group moves by all of ``kinds`` that its flags allow.

    P draws a permutation other than the identity, S signs, D factors within [1/2, 2], R an
    orthogonal matrix, and all four (P, S, D and R allowed and asked for) any invertible matrix with
    singular values within [1/2, 2]. Groups that others depend on are permuted only.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    parents = {p for g in symmetry.groups.values() for p in g.per}
    out: dict[str, Move] = {}
    for name, group in symmetry.groups.items():
        allowed = "".join(k for k in kinds if k in group.flags)
        if name in parents:
            allowed = allowed.replace("S", "").replace("D", "").replace("R", "")
        if not allowed:
            continue
        shape = shape_of(symmetry, name)
        flat = [_random_move(rng, group.size, allowed) for _ in range(symmetry.copies(name))]
        if isinstance(flat[0], Scaled):
            index = np.stack([m.index for m in flat if isinstance(m, Scaled)]).reshape(shape)
            factor = np.stack([m.factor for m in flat if isinstance(m, Scaled)]).reshape(shape)
            out[name] = Scaled(index, factor)
        else:
            stacked = np.stack([m for m in flat if not isinstance(m, Scaled)])
            out[name] = stacked.reshape(*shape[:-1], *stacked.shape[1:])
    return out


def _random_move(rng: Any, size: int, allowed: str) -> Move:
    import numpy as np

    if "R" in allowed:
        rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
        if "D" not in allowed:
            return np.asarray(rotation)
        other = np.linalg.qr(rng.normal(size=(size, size)))[0]
        return np.asarray(rotation * np.exp2(rng.uniform(-1, 1, size)) @ other)
    index = np.arange(size)
    if "P" in allowed:
        index = rng.permutation(size)
        if (index == np.arange(size)).all():
            index = np.roll(index, 1)
    if "S" not in allowed and "D" not in allowed:
        return np.asarray(index)
    factor = np.exp2(rng.uniform(-1, 1, size)) if "D" in allowed else np.ones(size)
    if "S" in allowed:
        factor = factor * rng.choice([-1.0, 1.0], size)
        factor[0] = -abs(factor[0])
    return Scaled(index, factor)


def inverse(symmetry: Symmetry, element: Element) -> dict[str, Move]:
    """The element that takes ``element`` back; bit for bit where it permutes only."""
    out: dict[str, Move] = {}
    for name, move in checked(symmetry, element).items():
        undone = _undone(move)
        came_from = _parents_moved(symmetry, symmetry.groups[name], element)
        if isinstance(undone, Scaled):
            out[name] = Scaled(undone.index[came_from], undone.factor[came_from])
        else:
            out[name] = undone[came_from]
    return out


def compose(symmetry: Symmetry, first: Element, second: Element) -> dict[str, Move]:
    """The element that does ``first`` and then ``second``."""
    import numpy as np

    one, two = checked(symmetry, first), checked(symmetry, second)
    still = identity(symmetry)
    out: dict[str, Move] = {}
    for name in dict.fromkeys([*one, *two]):
        group = symmetry.groups[name]
        a, b = one.get(name, still[name]), two.get(name, still[name])
        there = _parents_moved(symmetry, group, inverse(symmetry, one))
        b = Scaled(b.index[there], b.factor[there]) if isinstance(b, Scaled) else b[there]
        if is_matrix(a, b):
            out[name] = matrix_of(b, group.size) @ matrix_of(a, group.size)
            continue
        (p, u), (q, v) = _parts(a), _parts(b)
        index = np.take_along_axis(p, q, -1)
        factor = v * np.take_along_axis(u, q, -1)
        scaled = isinstance(a, Scaled) or isinstance(b, Scaled)
        out[name] = Scaled(index, factor) if scaled else index
    return out


def is_matrix(*moves: Move) -> bool:
    """Whether one of the moves is a matrix."""
    return any(not isinstance(m, Scaled) and m.dtype.kind == "f" for m in moves)


def matrix_of(move: Move, size: int) -> NDArray[Any]:
    """Any move as matrices of shape (parents..., n, n).

    >>> import numpy as np
    >>> matrix_of(np.array([1, 0]), 2).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    import numpy as np

    if is_matrix(move) and not isinstance(move, Scaled):
        return move
    index, factor = _parts(move)
    return np.asarray(np.eye(size)[index] * factor[..., None])


def _parts(move: Move) -> tuple[NDArray[Any], NDArray[Any]]:
    import numpy as np

    if isinstance(move, Scaled):
        return move.index, move.factor
    return move, np.ones(move.shape)


def _undone(move: Move) -> Move:
    import numpy as np

    if is_matrix(move):
        return np.linalg.inv(move)  # type: ignore[arg-type]
    index, factor = _parts(move)
    back = np.argsort(index, axis=-1)
    if isinstance(move, Scaled):
        return Scaled(back, 1.0 / np.take_along_axis(factor, back, -1))
    return np.asarray(back)


def _parents_moved(symmetry: Symmetry, group: Group, element: Element) -> tuple[Any, ...]:
    """For each new index of the group's parents the old one, as arrays to index a move with."""
    import numpy as np

    sizes = [symmetry.groups[p].size for p in group.per]
    codes = np.arange(int(np.prod(sizes))).reshape(sizes)
    depths = [len(symmetry.groups[p].per) for p in group.per]
    for k in sorted(range(len(sizes)), key=lambda k: -depths[k]):  # children before their parents
        move = element.get(group.per[k])
        if move is None:
            continue
        index = _parts(move)[0]
        above = [group.per.index(p) for p in symmetry.groups[group.per[k]].per]
        codes = np.take_along_axis(codes, spread(index, [*above, k], codes.ndim), k)
    return np.unravel_index(codes, sizes) if sizes else ()


def spread(values: NDArray[Any], dims: list[int], ndim: int, tail: int = 0) -> NDArray[Any]:
    """``values``, whose axes belong to ``dims``, shaped to be broadcast over all ``ndim`` axes.

    The last ``tail`` axes of ``values`` stay the last and belong to none.
    """
    import numpy as np

    order = sorted(range(len(dims)), key=lambda k: dims[k])
    rest = list(range(len(dims), len(dims) + tail))
    values = np.transpose(values, [*order, *rest])
    shape = [1] * ndim
    for k, dim in enumerate(sorted(dims)):
        shape[dim] = values.shape[k]
    return values.reshape(*shape, *values.shape[len(dims) :])


def checked(symmetry: Symmetry, element: Element) -> Element:
    """The element; `PlanError` where it moves what it may not, or has an array of another shape."""
    for name, move in element.items():
        if name not in symmetry.groups:
            raise PlanError(
                "an element moves a group that the symmetry does not have",
                group=name,
                expected=f"one of {', '.join(symmetry.groups)}",
            )
        shape = shape_of(symmetry, name)
        wanted = (*shape, shape[-1]) if is_matrix(move) else shape
        found = move.index.shape if isinstance(move, Scaled) else move.shape
        if found != wanted:
            raise PlanError(
                "a move has another shape than its group",
                group=name,
                found=list(found),
                expected=list(wanted),
            )
    return element
