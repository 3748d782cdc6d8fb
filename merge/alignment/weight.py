"""Weight matching: the permutations that bring one network's weights nearest to another's.

Git Re-Basin (Ainsworth et al. 2023, arXiv:2209.04836), on any network whose symmetry is known:
maximise ``<A, pi(B)>``, which is to minimise ``||A - pi(B)||``, by block ascent. Each group is
matched exactly, the others given, so the objective never falls, and it ends when nothing moves.

A sweep reads each tensor of both networks once. Given the order of the residual stream, the groups
within layers do not touch one another: each is matched while its tensors are held, and what these
are then worth to the residual stream is added up on the way; that is matched last.

A first sweep starts from groups that meet only what is fixed (pixels, tokens, classes), and goes on
to those that meet matched ones, so that networks far apart find a common frame to begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from merge.alignment.ascent import Ascent
from merge.alignment.families import families
from merge.alignment.held import Held, Reader
from merge.alignment.matching import identity
from merge.alignment.passes import passes_of
from merge.alignment.report import GroupReport, Match, Report, moved_share
from merge.errors import PlanError
from merge.symmetry.symmetry import Symmetry

__all__ = ["HOLD", "STATISTICS", "match_weights"]

HOLD = 1 << 26
"""Elements of both networks together that are held at a time, where the groups allow it."""

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
    hold: int = HOLD,
    progress: Callable[[int], None] | None = None,
) -> Match:
    """The element that brings network B nearest to network A, and a report.

    names: tensors to go by, in the order in which they are best read; by default all but the
    statistics of BatchNorm. keep: groups that stay. signed: groups with flag S change signs, too.
    start: an element to start from. sweeps: at most. hold: elements that are kept in memory.
    progress: called with bytes read since the last call. PlanError where nothing can move.
    """
    trees = families(symmetry, keep)
    chosen = [
        n
        for n in (symmetry.tensors if names is None else names)
        if not n.endswith(STATISTICS) and symmetry.tensors[n].groups()
    ]
    if not trees or not chosen:
        raise PlanError(
            "there is nothing to align: no group of the symmetry may be permuted",
            found=f"{len(symmetry.groups)} groups in {len(chosen)} tensors",
            do="give the symmetry spec of this network, or keep fewer groups where they are",
        )
    still = identity(*trees)
    passes = passes_of(symmetry, trees, chosen, hold // 2)
    held = Held(symmetry, a, b, chosen, hold, progress)
    ascent = Ascent(symmetry, passes, held, {**still, **(start or {})}, signed)
    ascent.run(sweeps, anchored=start is None)
    if start is None and ascent.objective[-1] < ascent.before - 1e-6 * abs(ascent.before):
        # a common frame that was begun from what is fixed is worse than the one there was
        ascent = Ascent(symmetry, passes, held, still, signed)
        ascent.run(sweeps, anchored=False)
    return Match(ascent.element, _report(symmetry, ascent, held))


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
    )
