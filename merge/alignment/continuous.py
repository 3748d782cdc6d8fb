"""Rotations where the symmetry allows them, after the permutations: named, and asked for.

``values``: any group that may be rotated, such as the dimensions of values in each head, which the
output projection undoes. ``phases``: the planes that rotary positions turn, in queries and keys.

Orthogonal matrices come from one SVD for each head (Procrustes). Where a group may be mixed by any
invertible matrix, both networks are first *balanced*: brought to coordinates in which what writes
the group and what reads it have equal Gram matrices. In those the invertible freedom has gone but
for a rotation; the result is brought back to the first network's own coordinates.

Unlike permutations, rotations are computed and rounded: tensors change by more than their order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge.alignment.costs import Term, parts_of, terms_of, views
from merge.alignment.families import Tree, families, members, names_of
from merge.alignment.held import Reader
from merge.alignment.matching import Scores, match_nested
from merge.alignment.nested import from_arrays, value_of
from merge.alignment.report import GroupReport, Match, moved_share
from merge.alignment.solvers import procrustes
from merge.errors import PlanError
from merge.symmetry.action import apply
from merge.symmetry.axes import Axis, Factor
from merge.symmetry.symmetry import Group, Symmetry

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["rotate", "with_phases"]

_SMALL = 1e-9  # of the largest singular value: what is less is no direction that is used


def rotate(
    symmetry: Symmetry, a: Reader, b: Reader, match: Match, kinds: Collection[str] = ("values",)
) -> tuple[Symmetry, Match]:
    """A match carried on from permutations to rotations, and the symmetry that it is of.

    match: of permutations; the orders of heads may change with what is in them. kinds: ``values``,
    ``phases`` or both. PlanError where the symmetry allows none of them.
    """
    turned: set[str] = set()
    if "phases" in kinds:
        symmetry, planes = with_phases(symmetry)
        turned |= planes
    parents = {p for g in symmetry.groups.values() for p in g.per}
    if "values" in kinds:
        turned |= {
            n for n, g in symmetry.groups.items()
            if {"P", "S", "R"} <= set(g.flags) and n not in parents and g.size > 1
        }  # fmt: skip
    trees = [_turning(t, turned, symmetry) for t in families(symmetry)]
    trees = [t for t in trees if any(inner.turns for inner in members(t))]
    if not trees:
        raise PlanError(
            "the symmetry allows none of the rotations that are asked for",
            found=", ".join(kinds),
            do="leave rotate out",
        )
    element = dict(match.element)
    gains = []
    for tree in trees:
        element, gain = _rotated(symmetry, a, b, tree, element)
        gains.append(gain)
    return symmetry, Match(element, _report(symmetry, match, element, turned, gains))


def _turning(tree: Tree, turned: Collection[str], symmetry: Symmetry) -> Tree:
    """The tree with the groups that turn; those that only turn are added to it."""
    known = {t.group for t in tree.below}
    added = [
        Tree(n, g.size, False, (), "phases")
        for n, g in symmetry.groups.items()
        if n in turned and g.per == (tree.group,) and n not in known
    ]
    below = tuple(_turning(t, turned, symmetry) for t in (*tree.below, *added))
    if tree.group in turned and not tree.turns:
        return replace(tree, turns="orthogonal")
    return replace(tree, below=below)


def _rotated(
    symmetry: Symmetry, a: Reader, b: Reader, tree: Tree, element: Mapping[str, Any]
) -> tuple[dict[str, Any], float]:
    """The element with a family's best rotations, and what they are worth more than what it had."""
    names = [n for n, x in symmetry.tensors.items() if names_of(tree) & {*x.groups()}]
    sides = [{n: reader.read(n).double() for n in names} for reader in (a, b)]
    free = [
        t.group
        for t in members(tree)
        if t.turns == "orthogonal" and "D" in symmetry.groups[t.group].flags
    ]
    balance = [{g: _balance(symmetry, side, g) for g in free} for side in sides]
    one, two = (apply(symmetry, side, move) for side, move in zip(sides, balance, strict=True))
    without = {g: m for g, m in element.items() if g not in names_of(tree)}
    two = apply(symmetry, two, without)
    terms: list[Term] = []
    for name in names:
        terms += terms_of(symmetry.tensors[name], one[name], two[name], tree, element)
    if tree.below:
        now = {**_no_turn(tree), **{g: m for g, m in element.items() if g in names_of(tree)}}
        found = match_nested(tree, terms, now)
        before = _worth(tree, terms, now)
        moves, value = found.element, found.value
    else:
        scores = Scores.of(tree, signed=False)
        scores.add(terms)
        before = scores.worth(element[tree.group])
        matrix, value = procrustes(scores.plain)
        moves = {tree.group: matrix}
    for group in free:
        moves[group] = _back(symmetry, group, moves, balance)
    return {**element, **moves}, value - before


def _worth(tree: Tree, terms: Sequence[Term], now: Mapping[str, Any]) -> float:
    return value_of([tree], parts_of(terms), {tree.group: from_arrays(tree, now)})


def _no_turn(tree: Tree) -> dict[str, Any]:
    """Matrices that leave what only turns as it is."""
    import numpy as np

    return {
        t.group: np.broadcast_to(np.eye(t.size), (tree.size, t.size, t.size))
        for t in members(tree)
        if t.turns == "phases"
    }


def _balance(symmetry: Symmetry, tensors: Mapping[str, Tensor], group: str) -> NDArray[Any]:
    """Matrices T (parents..., n, n) after which writers and readers have equal Gram matrices.

    With P and Q the Gram matrices of writers and readers, ``T P T' = T'^-1 Q T^-1`` for
    ``T'T = P^-1/2 (P^1/2 Q P^1/2)^1/2 P^-1/2``, the mean of P^-1 and Q (Pusz and Woronowicz 1975).
    """
    import numpy as np

    found = symmetry.groups[group]
    shape = (*(symmetry.groups[p].size for p in found.per), found.size, found.size)
    grams = {"": np.zeros(shape), "*": np.zeros(shape)}
    for name, tensor in tensors.items():
        for block, factors in views(tensor, symmetry.tensors[name].axes):
            places = [k for k, f in enumerate(factors) if f.group == group]
            if len(places) != 1:
                continue
            names = [f.group for f in factors]
            front = [*(names.index(p) for p in found.per), places[0]]
            rows = block.movedim(front, list(range(len(front))))
            rows = rows.reshape(math.prod(shape[:-2]), found.size, -1)
            gram = (rows @ rows.mT).numpy().reshape(shape)
            grams["*" if factors[places[0]].form == "*" else ""] += gram
    root, inverse = _powers(grams[""])
    middle = _powers(root @ grams["*"] @ root)[0]
    return _powers(inverse @ middle @ inverse)[0]


def _powers(matrix: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Square root and inverse square root of symmetric matrices, nearly singular ones too."""
    import numpy as np

    values, vectors = np.linalg.eigh(matrix)
    floor = _SMALL * values[..., -1:] + 1e-300
    roots = np.sqrt(np.maximum(values, floor))

    def with_values(chosen: NDArray[Any]) -> NDArray[Any]:
        made: NDArray[Any] = (vectors * chosen[..., None, :]) @ np.swapaxes(vectors, -1, -2)
        return made

    return with_values(roots), with_values(1.0 / roots)


def _back(
    symmetry: Symmetry,
    group: str,
    moves: Mapping[str, Any],
    balance: Sequence[Mapping[str, NDArray[Any]]],
) -> NDArray[Any]:
    """Rotations between balanced networks as matrices between the networks as they are."""
    import numpy as np

    mine, theirs = (side[group] for side in balance)
    found: NDArray[Any] = np.empty_like(moves[group])
    parents = symmetry.groups[group].per
    if not parents:
        whole: NDArray[Any] = np.linalg.solve(mine, moves[group]) @ theirs
        return whole
    order = moves[parents[0]]
    for i, j in enumerate(order):  # matrices go by the second network's own heads
        found[j] = np.linalg.solve(mine[i], moves[group][j]) @ theirs[j]
    return found


# -- rotary positions ------------------------------------------------------------------------------
def with_phases(symmetry: Symmetry) -> tuple[Symmetry, set[str]]:
    """The symmetry with a group for the rotary coordinates of each layer's keys, and those groups.

    Queries and keys are told by their names, ``q_proj`` and ``k_proj``: rows by key/value head, by
    query slot, and by coordinate, the second half of which turns with the first. Layers that
    normalise queries or keys are left alone, since a norm's gain does not turn.
    """
    tensors, groups = dict(symmetry.tensors), dict(symmetry.groups)
    found: set[str] = set()
    for name in symmetry.tensors:
        stem, _, part = name.rpartition("k_proj.")
        known = {g for g in symmetry.tensors[name].groups() if g.startswith("phase_")}
        if known:
            found |= known
            continue
        if part != "weight" or any(f"{stem}{x}_norm.weight" in tensors for x in "qk"):
            continue
        query, key = (_last_fixed(symmetry, f"{stem}{x}_proj.weight") for x in "qk")
        if query is None or key is None or query[0] != key[0] or query[1] != key[1] or key[1] % 2:
            continue
        group = f"phase_{key[0]}"
        groups[group] = Group(group, key[1], "R", (key[0],))
        found.add(group)
        for kind, form in (("q", ""), ("k", "*")):
            for end in ("weight", "bias"):
                place = f"{stem}{kind}_proj.{end}"
                if place in tensors:
                    tensors[place] = _with_last(tensors[place], Factor(group, key[1], form))  # type: ignore[arg-type]
    return replace(symmetry, tensors=tensors, groups=groups), found


def _last_fixed(symmetry: Symmetry, name: str) -> tuple[str, int] | None:
    """The first axis' outermost group and the size of its last factor, if that cannot move."""
    layout = symmetry.tensors.get(name)
    if layout is None or len(layout.axes[0].parts) != 1:
        return None
    product = layout.axes[0].parts[0]
    if len(product) < 2 or any(isinstance(f, Axis) for f in product):
        return None
    first, last = product[0], product[-1]
    assert isinstance(first, Factor) and isinstance(last, Factor)
    if first.group is None or (last.group and symmetry.groups[last.group].flags):
        return None
    return first.group, last.size


def _with_last(layout: Any, factor: Factor) -> Any:
    product = (*layout.axes[0].parts[0][:-1], factor)
    return replace(layout, axes=(Axis((product,)), *layout.axes[1:]))


def _report(
    symmetry: Symmetry,
    match: Match,
    element: Mapping[str, Any],
    turned: Collection[str],
    gains: Sequence[float],
) -> Any:
    moved, shares = moved_share(symmetry, element)
    known = {g.group: g for g in match.report.groups}
    groups = [
        replace(known[n], moved=share) if n in known
        else GroupReport(n, symmetry.groups[n].size, symmetry.copies(n), share, None)
        for n, share in shares.items()
    ]  # fmt: skip
    note = f"{len(turned)} groups rotated, worth {sum(gains):.6g} more than in their best order"
    return replace(
        match.report, moved=moved, groups=tuple(groups), notes=(*match.report.notes, note)
    )
