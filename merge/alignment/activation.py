"""Activation matching: units are alike when they answer alike to the same data.

One pass over the data through both networks gathers the correlation of each unit of the first with
each of the second (Li et al. 2016, arXiv:1511.07543; Ainsworth et al. 2023); each group is then
assigned once, independent of the others. All places at which a group's channels pass are pooled: in
a residual stream every layer that writes to it or reads from it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.alignment.costs import Part, views
from merge.alignment.families import Tree, families, names_of
from merge.alignment.matching import identity, match_parts
from merge.alignment.moments import Moments
from merge.alignment.report import GroupReport, Match, Report, moved_share
from merge.alignment.taps import Tap, taps_of, watched
from merge.errors import PlanError
from merge.statistics.lazy import cut
from merge.statistics.runs import run
from merge.symmetry.axes import Factor, factors_of
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["match_activations"]

MEMORY = 4 << 30
"""Bytes of accumulators that are held at a time; what needs more goes over the data again."""

_SAMPLES = 1 << 16
"""Rows of one activation that are used of a batch at most, evenly spread."""


def match_activations(
    symmetry: Symmetry,
    a: nn.Module,
    b: nn.Module,
    batches: Iterable[Any],
    *,
    covariance: bool = False,
    signed: bool = False,
    keep: Collection[str] = (),
    memory: int = MEMORY,
) -> Match:
    """The element that brings network B's units to those of A which answer like them.

    batches: inputs of both networks, each a tensor, a tuple or a mapping of arguments. covariance:
    of the activations as they are, else correlation, which no scale changes. Units that never
    change count nothing. signed: groups with flag S change signs, too. keep: groups that stay.
    PlanError where there is no data, and where no layer shows any group.
    """
    data = list(batches)
    if not data:
        raise PlanError(
            "there is no data to match activations on",
            found="no batches",
            expected="at least one batch of inputs of the networks",
            do="give data, or match by weights, which needs none",
        )
    trees = families(symmetry, keep)
    taps = taps_of(a, symmetry)
    seen: Seen = {t.group: {} for t in trees}
    for part in _portions(trees, taps, memory):
        _gather((a, b), taps, data, part, trees, seen, covariance)
    shown = [t for t in trees if seen[t.group]]
    if not shown:
        raise PlanError(
            "no layer shows the activations of a group that may move",
            found=f"{len(taps)} layers, {len(trees)} groups",
            do="match by weights, or write the network with torch.nn's layers",
        )
    element = identity(*trees)
    scores: dict[str, float] = {}
    notes = [f"{t.group}: no layer shows it, so it stays" for t in trees if t not in shown]
    for tree in shown:
        pools = seen[tree.group]
        parts = [Part(groups, pool.scores(covariance)) for groups, pool in pools.items()]
        can_sign = signed and "S" in symmetry.groups[tree.group].flags
        found = match_parts(tree, parts, element, signed=can_sign)
        element.update(found.element)
        scores[tree.group] = found.value / sum(
            p.weight * math.prod(p.sizes) for p in pools.values()
        )
        fewest = min(pool.moments.count for pool in pools.values())
        if fewest < tree.size:
            notes.append(f"{tree.group}: only {fewest} samples for its {tree.size} coordinates")
    return Match(element, _report(symmetry, element, scores, covariance, notes))


@dataclass(slots=True)
class _Pool:
    """Moments of one kind of place, such as dimensions in heads. weight: units in each place."""

    sizes: tuple[int, ...]
    weight: int
    moments: Moments = field(default_factory=Moments)

    def scores(self, covariance: bool) -> Any:
        """Products of all pairs, axes of the first network's groups and then of the second's."""
        found = self.moments.covariance() if covariance else self.moments.correlation()
        return (found * self.weight).cpu().numpy().reshape(*self.sizes, *self.sizes)


Seen = dict[str, dict[tuple[str, ...], _Pool]]


def _portions(trees: Sequence[Tree], taps: Sequence[Tap], memory: int) -> list[list[Tree]]:
    """The trees in portions whose accumulators fit the memory."""

    def need(tree: Tree) -> int:
        names = names_of(tree)
        sizes = {
            math.prod(f.size for f in factors_of(tap.axis) if f.group in names) for tap in taps
        }
        return sum(8 * n * n for n in sizes)

    return cut(trees, need, memory)


def _gather(
    networks: tuple[nn.Module, nn.Module],
    taps: Sequence[Tap],
    data: Sequence[Any],
    trees: Sequence[Tree],
    every: Sequence[Tree],
    seen: Seen,
    covariance: bool,
) -> None:
    """Run the data through both networks and gather how the trees' groups answer."""
    import torch

    wanted = names_of(*trees)
    moving = names_of(*every)
    chosen = [t for t in taps if wanted & {f.group for f in factors_of(t.axis) if f.group}]
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def rows(number: int, which: int, value: Tensor) -> Tensor:
        """An activation as (samples, channels). For correlations each channel is brought to mean 0
        and deviation 1 by the first batch, so that each place counts the same in a pool."""
        flat = value.movedim(chosen[number].channel, -1).flatten(0, -2)
        flat = flat[:: -(-len(flat) // _SAMPLES)].double()
        if covariance:
            return flat
        key = (number, which)
        if key not in known:
            deviation, mean = torch.std_mean(flat, 0, correction=0)
            usual = deviation.mean()
            alive = deviation > 1e-6 * usual
            known[key] = (mean, torch.where(alive, deviation, usual if usual else 1.0))
        return (flat - known[key][0]) / known[key][1]

    for batch in data:
        first: dict[int, list[Tensor]] = {}

        def keep(number: int, value: Tensor, first: dict[int, list[Tensor]] = first) -> None:
            first.setdefault(number, []).append(rows(number, 0, value))

        def see(number: int, value: Tensor, first: dict[int, list[Tensor]] = first) -> None:
            pair = (first[number].pop(0), rows(number, 1, value))
            for tree in trees:
                others = moving - names_of(tree)
                _add(tree, others, chosen[number], pair, seen[tree.group])

        for network, look in zip(networks, (keep, see), strict=True):
            with watched(network, chosen, look):
                run(network, batch)


def _add(
    tree: Tree,
    others: Collection[str],
    tap: Tap,
    pair: tuple[Tensor, Tensor],
    pools: dict[tuple[str, ...], _Pool],
) -> None:
    """Add one activation of both networks to what is known of a tree's groups."""
    names = names_of(tree)
    if not names & {f.group for f in factors_of(tap.axis) if f.group}:
        return
    samples = Factor(None, len(pair[0]))
    blocks = [list(views(x, (samples, tap.axis))) for x in pair]
    for (x, factors), (y, _) in zip(*blocks, strict=True):
        own = [k for k, f in enumerate(factors) if f.group in names]
        if not own or any(f.group in others for f in factors):
            continue  # a part without the group, or one that counts something unmatched beside it
        own.sort(key=lambda k: str(factors[k].group))
        sizes = tuple(factors[k].size for k in own)
        weight = math.prod(f.size for f in factors[1:]) // math.prod(sizes)
        groups = tuple(str(factors[k].group) for k in own)
        pool = pools.setdefault(groups, _Pool(sizes, weight))
        last = list(range(-len(own), 0))
        flat = [z.movedim(own, last).reshape(-1, math.prod(sizes)) for z in (x, y)]
        pool.moments.add(flat[0], flat[1])


def _report(
    symmetry: Symmetry,
    element: dict[str, Any],
    scores: dict[str, float],
    covariance: bool,
    notes: Sequence[str],
) -> Report:
    moved, shares = moved_share(symmetry, element)
    groups = tuple(
        GroupReport(n, symmetry.groups[n].size, symmetry.copies(n), share, scores.get(n))
        for n, share in shares.items()
    )
    total = math.fsum(scores.values())
    return Report(
        method="activation matching" + " by covariance" * covariance,
        objective=(total,),
        converged=True,
        before=None,
        after=None,
        moved=moved,
        groups=groups,
        notes=tuple(notes),
    )
