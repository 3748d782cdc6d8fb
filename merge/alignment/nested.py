"""Matching of a group together with those that depend on it, from products of all pairs.

For each pair (i, j) of indices of the group, what depends on it is matched first; the value of
that is the score of the pair, and the group is assigned last. Where only one group depends on it
the result is exact. Several ones that meet in a tensor, as query slots and value dimensions in an
output projection, are matched in turns within each pair; up to four slots the result is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.alignment.costs import Part
from merge.alignment.families import Tree
from merge.alignment.solvers import assign, phases, procrustes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Solved", "arrays", "from_arrays", "solve", "solve_together", "still", "value_of"]

_ROUNDS = 20
"""Turns within a pair at most; two or three are usual."""

_FEW = 24
"""Permutations of which all are tried: those of four query heads that share a key."""


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """Coordinate i is coordinate ``index[i]`` of the second network, or row i of a matrix says of
    which mixture of coordinates it is.

    below: for each i, the groups that depend on this one, matched within the pair (i, index[i]).
    """

    index: NDArray[Any]
    below: tuple[Mapping[str, Solved], ...] = ()
    potentials: NDArray[Any] | None = field(default=None, repr=False)


def solve(tree: Tree, parts: Sequence[Part], start: Solved) -> tuple[Solved, float]:
    """The best matching of a tree and its value. Every part has the tree's group once.

    start: kept where nothing is better.
    """
    import numpy as np

    alone = [p.products for p in parts if p.groups == (tree.group,)]
    scores = np.zeros((tree.size, tree.size))
    for products in alone:
        scores += products
    if tree.turns:
        matrix, value = (phases if tree.turns == "phases" else procrustes)(scores)
        return Solved(matrix), value
    if not tree.below:
        return _assigned(tree, scores, start)
    nested = [p for p in parts if p.groups != (tree.group,)]
    pairs: dict[tuple[int, int], Mapping[str, Solved]] = {}
    for i in range(tree.size):
        for j in range(tree.size) if tree.moves else [i]:
            inner = [_at(p, tree.group, i, j) for p in nested]
            known = start.below[i] if start.index[i] == j else None
            pairs[i, j], value = solve_together(tree.below, inner, known)
            scores[i, j] += value
    found, value = _assigned(tree, scores, start)
    chosen = tuple(pairs[i, int(j)] for i, j in enumerate(found.index))
    return Solved(found.index, chosen), value


def _assigned(tree: Tree, scores: NDArray[Any], start: Solved) -> tuple[Solved, float]:
    import numpy as np

    if not tree.moves:
        return start, float(scores[np.arange(tree.size), start.index].sum())
    found = assign(scores, start.index)
    return Solved(found.index), found.value


def solve_together(
    trees: Sequence[Tree], parts: Sequence[Part], start: Mapping[str, Solved] | None
) -> tuple[dict[str, Solved], float]:
    """The matching of several groups, and what it is worth; start: kept where nothing is better."""
    total = sum(float(p.products) for p in parts if not p.groups)
    found: dict[str, Solved] = {}
    for meeting in _meeting(trees, [p.groups for p in parts]):
        names = {t.group for t in meeting}
        own = [p for p in parts if names & {*p.groups}]
        known = {n: start[n] for n in names} if start else {t.group: still(t) for t in meeting}
        if len(meeting) == 1:
            found[meeting[0].group], value = solve(meeting[0], own, known[meeting[0].group])
        else:
            inner, value = _in_turns(meeting, own, known)
            found |= inner
        total += value
    return found, total


def _meeting(trees: Sequence[Tree], places: Sequence[tuple[str, ...]]) -> list[list[Tree]]:
    """The trees in sets that have no place in common with another set."""
    sets: list[list[Tree]] = []
    for tree in trees:
        joined = [
            s for s in sets if any(tree.group in p and any(t.group in p for t in s) for p in places)
        ]
        sets = [s for s in sets if s not in joined]
        sets.append([t for s in joined for t in s] + [tree])
    return sets


def _in_turns(
    trees: Sequence[Tree], parts: Sequence[Part], start: Mapping[str, Solved]
) -> tuple[dict[str, Solved], float]:
    """The matching of groups that meet in parts: each exact given the others, until none gains.

    They begin from where the parts lead in which each stands alone, or from ``start`` if that is
    better. Of two groups, one with few permutations, the best of all is found in the end.
    """
    alone = {}
    for tree in trees:
        rest = {t.group for t in trees if t is not tree}
        own = [p for p in parts if tree.group in p.groups and not rest & {*p.groups}]
        alone[tree.group] = solve(tree, own, start[tree.group])[0]
    now, value = max(
        ((dict(at), value_of(trees, parts, at)) for at in (start, alone)), key=lambda f: f[1]
    )
    for _ in range(_ROUNDS):
        before = value
        for tree in trees:
            others = [t for t in trees if t is not tree]
            mine = [_contracted(p, others, now) for p in parts if tree.group in p.groups]
            elsewhere = [p for p in parts if tree.group not in p.groups]
            now[tree.group], gained = solve(tree, mine, now[tree.group])
            value = gained + value_of(others, elsewhere, now)
        if value <= before + 1e-12 * abs(before):
            break
    few = [
        t for t in trees if t.moves and not (t.below or t.turns) and math.factorial(t.size) <= _FEW
    ]
    if len(trees) == 2 and few and not any(t.below for t in trees):
        return _best_of_all(few[0], next(t for t in trees if t is not few[0]), parts, now, value)
    return now, value


def _best_of_all(
    few: Tree, other: Tree, parts: Sequence[Part], now: dict[str, Solved], value: float
) -> tuple[dict[str, Solved], float]:
    """The best matching of two groups: all permutations of the first, where they might be better.

    No assignment is worth more than the largest score of each row together, and no rotation more
    than the lengths of all rows; most end there.
    """
    import numpy as np

    rest = [p for p in parts if other.group not in p.groups]
    both = [p for p in parts if other.group in p.groups]
    for order in itertools.permutations(range(few.size)):
        at = {few.group: Solved(np.array(order))}
        fixed = value_of([few], rest, at)
        inner = [_contracted(p, [few], at) for p in both]
        scores = np.sum([p.products for p in inner], axis=0)
        most = np.linalg.norm(scores, axis=1).sum() if other.turns else scores.max(axis=1).sum()
        if fixed + most <= value:
            continue
        found, gained = solve(other, inner, now[other.group])
        if fixed + gained > value + 1e-12 * abs(value):
            now, value = {**at, other.group: found}, fixed + gained
    return now, value


def value_of(trees: Sequence[Tree], parts: Sequence[Part], at: Mapping[str, Solved]) -> float:
    """What a matching is worth: the products of the pairs that it makes, added up."""
    return sum(float(_contracted(p, trees, at).products) for p in parts)


def _at(part: Part, group: str, i: int, j: int) -> Part:
    """The products at index i of a group in the first network and j in the second."""
    k, count = part.groups.index(group), len(part.groups)
    place: list[Any] = [slice(None)] * (2 * count)
    place[k], place[count + k] = i, j
    return Part(part.groups[:k] + part.groups[k + 1 :], part.products[tuple(place)])


def _contracted(part: Part, trees: Sequence[Tree], at: Mapping[str, Solved]) -> Part:
    """A part with the groups of ``trees`` matched as they are now, and added up over them."""
    import numpy as np

    for tree in trees:
        if tree.group not in part.groups:
            continue
        solved = at[tree.group]
        inner = [t for t in tree.below if t.group in part.groups]
        if inner:
            pieces = [
                _contracted(_at(part, tree.group, i, int(j)), inner, solved.below[i])
                for i, j in enumerate(solved.index)
            ]
            part = Part(pieces[0].groups, np.sum([p.products for p in pieces], axis=0))
            continue
        k, count = part.groups.index(tree.group), len(part.groups)
        rest = part.groups[:k] + part.groups[k + 1 :]
        if solved.index.ndim == 2:
            mixed = np.tensordot(part.products, solved.index, axes=([k, count + k], [0, 1]))
            part = Part(rest, mixed)
            continue
        paired = np.take(part.products, solved.index, axis=count + k)
        total = np.trace(paired, axis1=k, axis2=count + k, dtype=np.float64)
        part = Part(rest, total)
    return part


def still(tree: Tree) -> Solved:
    """The matching that leaves everything where it is."""
    import numpy as np

    inner = {t.group: still(t) for t in tree.below}
    return Solved(np.arange(tree.size), (inner,) * tree.size if inner else ())


def arrays(tree: Tree, solved: Solved) -> dict[str, NDArray[Any]]:
    """The matching as a group element: for each group the permutation, for each *old* index of
    those that it depends on."""
    import numpy as np

    out: dict[str, NDArray[Any]] = {tree.group: solved.index}
    for child in tree.below:
        rows = [arrays(child, inner[child.group]) for inner in solved.below]
        for name in rows[0]:
            stacked = np.empty((tree.size, *rows[0][name].shape), rows[0][name].dtype)
            for i, j in enumerate(solved.index):
                stacked[j] = rows[i][name]
            out[name] = stacked
    return out


def from_arrays(tree: Tree, element: Mapping[str, Any]) -> Solved:
    """The matching that an element of permutations makes; the inverse of `arrays`."""
    index = element[tree.group]
    if not tree.below:
        return Solved(index)

    def inner(child: Tree, j: int) -> dict[str, Any]:
        names = [child.group, *(n for t in child.below for n in _names(t))]
        return {n: element[n][j] for n in names}

    below = tuple({t.group: from_arrays(t, inner(t, int(j))) for t in tree.below} for j in index)
    return Solved(index, below)


def _names(tree: Tree) -> list[str]:
    return [tree.group, *(n for t in tree.below for n in _names(t))]
