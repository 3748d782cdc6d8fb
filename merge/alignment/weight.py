"""Weight matching: the permutations that bring one network's weights nearest to another's.

Git Re-Basin (Ainsworth et al. 2023, arXiv:2209.04836), on any network whose symmetry is known:
maximise ``<A, pi(B)>``, which is to minimise ``||A - pi(B)||``, by block ascent. Each group is
matched exactly, the others given, so the objective never falls, and it ends when nothing moves.

A sweep reads each tensor of both networks once. Given the order of the residual stream, the groups
within layers do not touch one another: each is matched while its tensors are held, and what these
are then worth to the residual stream is added up on the way; that is matched last.

A first sweep starts from groups that meet only what is fixed (pixels, tokens, classes), and goes on
to those that meet matched ones, so that networks far apart find a common frame to begin with. The
ascent ends in a local optimum: small networks that are still unlike are matched again from random
elements, and the best is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from merge.alignment.ascent import Ascent
from merge.alignment.families import Tree, families, members
from merge.alignment.held import Held, Reader
from merge.alignment.matching import identity
from merge.alignment.passes import passes_of
from merge.alignment.report import GroupReport, Match, Report, moved_share
from merge.errors import PlanError
from merge.symmetry.elements import random_element
from merge.symmetry.symmetry import Symmetry

__all__ = ["HOLD", "STATISTICS", "match_weights"]

HOLD = 1 << 26
"""Elements of both networks together that are held at a time, where the groups allow it."""

_RESTARTS = 20

_EFFORT = 1 << 21
"""Elements of one network, over all starts, up to which more starts are made."""

_REASONS = 4  # for which nothing moves, that an error tells

_ALIKE = 0.9  # cosine of networks that need no other start

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Ends of names of tensors that are moved along, but say nothing about which units are alike."""


def match_weights(
    symmetry: Symmetry,
    a: Reader,
    b: Reader,
    *,
    names: Sequence[str] | None = None,
    keep: Collection[str] = (),
    signed: bool = False,
    start: Mapping[str, Any] | None = None,
    sweeps: int = 100,
    restarts: int | None = None,
    hold: int = HOLD,
    progress: Callable[[int], None] | None = None,
) -> Match:
    """The element that brings network B nearest to network A, and a report.

    names: tensors to go by, in the order in which they are best read; by default all but the
    statistics of BatchNorm. keep: groups that stay. signed: groups with flag S change signs, too.
    start: an element to start from. sweeps: at most. restarts: how often the search begins anew
    from a random element where the networks are unlike (a cosine below 0.9); by default up to 20
    times for small networks (2 million elements at most over all starts), and never for one that is
    not held in memory as a whole, or from a given start. hold: elements that are kept in memory.
    progress: called with bytes read since the last call. PlanError where nothing can move.
    """
    trees = families(symmetry, keep)
    chosen = [
        n
        for n in (symmetry.tensors if names is None else names)
        if not n.endswith(STATISTICS) and symmetry.tensors[n].groups()
    ]
    if not trees or not chosen:
        why = [*symmetry.notes, *symmetry.reasons.values()][:_REASONS]
        raise PlanError(
            "there is nothing to align: no group of the symmetry may be permuted",
            found="; ".join([f"{len(symmetry.groups)} groups in {len(chosen)} tensors", *why]),
            do="give the symmetry spec of this network, or keep fewer groups where they are",
        )
    still = identity(*trees)
    passes = passes_of(symmetry, trees, chosen, hold // 2)
    held = Held(symmetry, a, b, chosen, hold, progress)
    ascent = Ascent(symmetry, passes, held, {**still, **(start or {})}, signed)
    ascent.run(sweeps, anchored=start is None)
    if start is None:
        count = held.elements(chosen)
        if restarts is None:
            restarts = min(_RESTARTS, _EFFORT // max(1, count))
        wanted = restarts if 2 * count <= hold else 0
        for begin in _starts(symmetry, trees, still, ascent, wanted):
            other = Ascent(symmetry, passes, held, dict(begin), signed)
            other.run(sweeps, anchored=False)
            if other.objective[-1] > ascent.objective[-1] + 1e-6 * abs(ascent.before):
                ascent = other
    return Match(ascent.element, _report(symmetry, ascent, held))


def _starts(
    symmetry: Symmetry,
    trees: Sequence[Tree],
    still: Mapping[str, Any],
    first: Ascent,
    restarts: int,
) -> Iterator[Mapping[str, Any]]:
    """Elements to begin from after the first ascent, of which there need not be any."""
    if first.objective[-1] < first.before - 1e-6 * abs(first.before):
        yield still  # a frame that was begun from what is fixed is worse than the one there was
    scale = first.scale(list(first.norms))
    if max(first.objective[-1], first.before) >= _ALIKE * scale:
        return
    moving = [t.group for t in members(*trees) if t.moves]
    for seed in range(restarts):
        drawn = random_element(symmetry, seed)
        yield {**still, **{g: drawn[g] for g in moving}}


def _report(symmetry: Symmetry, ascent: Ascent, held: Held) -> Report:
    moved, shares = moved_share(symmetry, ascent.element)
    groups = [
        GroupReport(
            name,
            symmetry.groups[name].size,
            symmetry.copies(name),
            share,
            ascent.cosine(name),
        )
        for name, share in shares.items()
    ]
    scale = ascent.scale(list(ascent.norms)) or 1.0
    return Report(
        method="weight matching",
        objective=tuple(ascent.objective),
        converged=ascent.converged,
        before=ascent.before / scale,
        after=ascent.objective[-1] / scale,
        moved=moved,
        groups=tuple(groups),
        bytes_read=held.bytes_read,
        notes=symmetry.notes,
    )
