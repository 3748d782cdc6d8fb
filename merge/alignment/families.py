"""Which groups are matched together: a group and those that move in another way for each of its
indices, as query heads and value dimensions within a key/value head."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from merge.symmetry.symmetry import Symmetry

__all__ = ["Tree", "families", "members", "names_of"]


@dataclass(frozen=True, slots=True)
class Tree:
    """A group with the groups that depend on it. ``moves`` is False for one that stays itself.

    turns: how a group is moved that is not permuted: by any orthogonal matrix, or by a phase for
    each pair of coordinates (j, j + n/2), as rotary positions allow it.
    """

    group: str
    size: int
    moves: bool
    below: tuple[Tree, ...] = ()
    turns: Literal["", "orthogonal", "phases"] = ""


def families(symmetry: Symmetry, keep: Collection[str] = ()) -> tuple[Tree, ...]:
    """The groups that may be permuted, as trees in the symmetry's order; those in ``keep`` stay.

    A group that depends on two unrelated ones stays too: no pair of indices of one parent tells
    which of the other it meets.
    """
    moving = [
        name
        for name, group in symmetry.groups.items()
        if "P" in group.flags and group.size > 1 and name not in keep and _chained(symmetry, name)
    ]
    needed = {p for name in moving for p in symmetry.groups[name].per} | set(moving)
    roots = [n for n, g in symmetry.groups.items() if n in needed and not g.per]
    return tuple(_tree(symmetry, root, needed, set(moving)) for root in roots)


def _chained(symmetry: Symmetry, name: str) -> bool:
    """Whether each of the group's parents depends on all that stand above it."""
    depths = sorted(len(symmetry.groups[p].per) for p in symmetry.groups[name].per)
    return depths == list(range(len(depths)))


def _tree(symmetry: Symmetry, name: str, needed: set[str], moving: set[str]) -> Tree:
    depth = len(symmetry.groups[name].per)
    below = [
        n
        for n, g in symmetry.groups.items()
        if n in needed and len(g.per) == depth + 1 and name in g.per
    ]
    children = tuple(_tree(symmetry, n, needed, moving) for n in below)
    return Tree(name, symmetry.groups[name].size, name in moving, children)


def members(*trees: Tree) -> Iterator[Tree]:
    """All groups of the trees, parents before those that depend on them."""
    for tree in trees:
        yield tree
        yield from members(*tree.below)


def names_of(*trees: Tree) -> set[str]:
    """Names of all groups of the trees."""
    return {t.group for t in members(*trees)}
