"""Couplings found by how units answer to data, for networks whose widths may differ.

Each place at which a space shows itself gives the distances of its units' answers: of answers
brought to mean 0 and deviation 1, ``2 - 2 correlation``. A space that shows itself in many places,
as a residual stream does, sums over them; how much each counts is the *policy*, after the ways in
which transport maps are carried over residual connections in the fusion of transformers
(Imfeld et al. 2024, arXiv:2310.05719).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from merge.alignment.costs import views
from merge.alignment.families import Tree, names_of
from merge.alignment.moments import Moments
from merge.alignment.taps import Tap, taps_of, watched
from merge.errors import PlanError
from merge.statistics.lazy import cut
from merge.statistics.runs import run
from merge.symmetry.axes import Factor, factors_of
from merge.symmetry.roles import counted
from merge.symmetry.symmetry import Symmetry
from merge.transport.couple import Coupled, Manner, check_sizes, still, trees_of
from merge.transport.coupling import Coupling
from merge.transport.solve import CostPart, Solver

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["POLICIES", "Policy", "Seen", "couple_activations"]

Policy = Literal["mean", "no_resid", "only_resid", "weighted_scalar", "weighted_matrix"]
POLICIES = ("mean", "no_resid", "only_resid", "weighted_scalar", "weighted_matrix")
"""Which places a residual stream is coupled by: all alike; the last branch that writes to it; the
first place; all by the size of their activations; the same for each channel."""

MEMORY = 4 << 30
"""Bytes of accumulators that are held at a time; what needs more goes over the data again."""

_SAMPLES = 1 << 14
"""Rows of one activation that are used of a batch at most, evenly spread."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A network that is run: its module, its symmetry, and the inputs that it gets.

    The symmetry has the tensors of the target; the module's may have other names.
    """

    module: nn.Module
    symmetry: Symmetry
    inputs: Sequence[Any]


@dataclass(slots=True, eq=False)
class _Place:
    """What is gathered at one place of one space. weight: units beside one another there."""

    tree: Tree
    pair: tuple[int, int]
    groups: tuple[str, ...]
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    weight: int
    moments: Moments = field(default_factory=Moments)


def couple_activations(
    a: Seen,
    b: Seen,
    manner: Manner | None = None,
    *,
    policy: Policy = "mean",
    centred: bool = True,
    keep: Collection[str] = (),
    layer_of: Callable[[str], str | None] = lambda name: name,
    memory: int = MEMORY,
) -> Coupled:
    """The coupling of every space of the network ``a`` with that of ``b``, the target.

    Both get inputs of the same samples in the same order. policy: which places of a residual stream
    count. centred: answers are brought to mean 0 and deviation 1; else compared as they are.
    layer_of: from the name of a module of b to that of its like in a, None where there is none.
    PlanError where there is no data, and where no layer shows any group.
    """
    manner = manner or Manner()
    if not a.inputs or len(a.inputs) != len(b.inputs):
        raise PlanError(
            "there is no data to couple by activations on",
            found=f"{len(a.inputs)} and {len(b.inputs)} batches",
            expected="the same batches of inputs for both networks",
            do="give data, or couple by weights, which needs none",
        )
    trees = trees_of(a.symmetry, b.symmetry, keep)
    check_sizes(a.symmetry, b.symmetry, trees)
    taps = _pairs(a, b, layer_of)
    parts: dict[str, list[CostPart]] = {t.group: [] for t in trees}
    wanted = {t.group: _counting(t, taps, policy) for t in trees}
    for places in _portions(trees, taps, wanted, memory):
        _gather(a, b, taps, places)
        for place in places:
            if place.moments.count:
                weights = _weights(place.moments, policy if not place.tree.below else "mean")
                parts[place.tree.group].append(_part(place, weights, centred))
    solver = Solver(a.symmetry, b.symmetry, manner, counted(b.symmetry))
    known: dict[str, Coupling] = {}
    scores: dict[str, float] = {}
    costs, notes = [], []
    for tree in trees:
        if not parts[tree.group]:
            known[tree.group] = _unseen(a.symmetry, b.symmetry, tree)
            notes.append(f"{tree.group}: no layer shows it, so its units are taken in order")
            continue
        found = solver.of_parts(tree, parts[tree.group])
        known[tree.group], scores[tree.group] = found.coupling, found.score
        costs.append(found.cost)
    if not scores:
        raise PlanError(
            "no layer shows the activations of a group that may move",
            found=f"{len(taps)} layers, {len(trees)} groups",
            do="couple by weights, or write the network with torch.nn's layers",
        )
    return Coupled(known, scores, (math.fsum(costs),), True, tuple(notes))


def _pairs(a: Seen, b: Seen, layer_of: Callable[[str], str | None]) -> list[tuple[Tap, Tap]]:
    """The places of both networks that are alike, in b's order."""
    ours = {(t.module, t.output): t for t in taps_of(b.module, a.symmetry)}
    layers = dict(a.module.named_modules())
    found = []
    for tap in taps_of(b.module, b.symmetry):
        like = layer_of(tap.module)
        mine = ours.get((tap.module, tap.output))
        if like is not None and like in layers and mine is not None:
            found.append((replace(mine, module=like), tap))
    return found


def _counting(tree: Tree, taps: Sequence[tuple[Tap, Tap]], policy: Policy) -> set[int]:
    """The places that count for a tree under a policy."""
    names = names_of(tree)
    held = [
        k
        for k, (_, tap) in enumerate(taps)
        if names & {f.group for f in factors_of(tap.axis) if f.group}
    ]
    if tree.below or policy not in ("no_resid", "only_resid") or not held:
        return set(held)
    if policy == "only_resid":
        return {held[0]}
    written = [k for k in held if taps[k][1].output]
    return {written[-1] if written else held[-1]}


def _portions(
    trees: Sequence[Tree],
    taps: Sequence[tuple[Tap, Tap]],
    wanted: Mapping[str, set[int]],
    memory: int,
) -> list[list[_Place]]:
    """The places in portions whose accumulators fit the memory."""
    moving = names_of(*trees)
    places = (
        place
        for tree in trees
        for k in sorted(wanted[tree.group])
        for place in _places(tree, k, taps[k], moving)
    )
    return cut(places, lambda p: 8 * math.prod(p.sizes[0]) * math.prod(p.sizes[1]), memory)


def _places(
    tree: Tree, number: int, pair: tuple[Tap, Tap], moving: Collection[str]
) -> Iterator[_Place]:
    """The blocks of an activation in which a tree's groups stand, and no other that moves."""
    import torch

    names = names_of(tree)
    axes = [tap.axis for tap in pair]
    empty = [torch.empty(0, axis.size) for axis in axes]
    blocks = [list(views(x, (Factor(None, 0), axis))) for x, axis in zip(empty, axes, strict=True)]
    for which, ((_, ours), (_, theirs)) in enumerate(zip(*blocks, strict=True)):
        own = [k for k, f in enumerate(ours) if f.group in names]
        if not own or any(f.group in moving and f.group not in names for f in ours):
            continue
        own.sort(key=lambda k: str(ours[k].group))
        sizes = (tuple(ours[k].size for k in own), tuple(theirs[k].size for k in own))
        rest = math.prod(f.size for f in ours[1:]) // math.prod(sizes[0])
        groups = tuple(str(ours[k].group) for k in own)
        yield _Place(tree, (number, which), groups, sizes, rest)


def _gather(a: Seen, b: Seen, taps: Sequence[tuple[Tap, Tap]], places: Sequence[_Place]) -> None:
    """Run the data through both networks and add up what the places show."""
    used = sorted({p.pair[0] for p in places})
    for ours, theirs in zip(a.inputs, b.inputs, strict=True):
        first: dict[int, list[Tensor]] = {}
        last: dict[int, list[Tensor]] = {}
        for seen, side, batch, kept in ((a, 0, ours, first), (b, 1, theirs, last)):

            def look(n: int, value: Tensor, side: int = side, kept: Any = kept) -> None:
                flat = value.movedim(taps[used[n]][side].channel, -1).flatten(0, -2)
                kept.setdefault(used[n], []).append(flat[:: -(-len(flat) // _SAMPLES)])

            with watched(seen.module, [taps[k][side] for k in used], look):
                run(seen.module, batch)
        for place in places:
            pairs = zip(first.get(place.pair[0], ()), last.get(place.pair[0], ()), strict=True)
            for x, y in pairs:
                if len(x) != len(y):
                    raise PlanError(
                        "the two networks answer with different numbers of samples",
                        layer=taps[place.pair[0]][1].module,
                        found=len(x),
                        expected=len(y),
                        do="couple by weights, or give both networks inputs of one size",
                    )
                place.moments.add(*(_rows(place, k, z, taps) for k, z in enumerate((x, y))))


def _rows(place: _Place, side: int, value: Tensor, taps: Sequence[tuple[Tap, Tap]]) -> Tensor:
    """An activation as (samples, units) of a place's groups."""
    number, which = place.pair
    axis = taps[number][side].axis
    block, factors = list(views(value, (Factor(None, len(value)), axis)))[which]
    order = [k for g in place.groups for k, f in enumerate(factors) if f.group == g]
    moved = block.movedim(order, list(range(-len(order), 0)))
    return moved.reshape(-1, math.prod(place.sizes[side]))


def _weights(moments: Moments, policy: Policy) -> Any:
    """How much a place counts: one number, or one for each of the target's units."""
    if policy not in ("weighted_scalar", "weighted_matrix"):
        return 1.0
    sizes = (moments.squares[1] / moments.count + moments.means[1].square()).sqrt()
    return float(sizes.mean()) if policy == "weighted_scalar" else sizes.cpu().numpy()


def _part(place: _Place, weights: Any, centred: bool) -> CostPart:
    """The distances of all pairs of units in one place."""
    moments = place.moments
    if centred:
        cost = 2.0 - 2.0 * moments.correlation()
    else:
        sizes = [
            s / moments.count + m.square()
            for s, m in zip(moments.squares, moments.means, strict=True)
        ]
        products = moments.covariance() + moments.means[0][:, None] * moments.means[1]
        cost = sizes[0][:, None] + sizes[1] - 2.0 * products
    found = cost.clamp_min(0.0).cpu().numpy() * weights * place.weight
    return CostPart(place.groups, found.reshape(*place.sizes[0], *place.sizes[1]))


def _unseen(source: Symmetry, target: Symmetry, tree: Tree) -> Coupling:
    """Units in order, where nothing tells which are alike."""
    import numpy as np

    from merge.transport.plans import of_index

    n, m = source.groups[tree.group].size, target.groups[tree.group].size
    if n == m and not tree.below:
        return still(source, tree)
    index = np.arange(m) * n // m
    below = {
        (int(j), i): {t.group: _unseen(source, target, t) for t in tree.below}
        for i, j in enumerate(index)
        if tree.below
    }
    return Coupling(of_index(index, n), below)
