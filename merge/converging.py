"""Whether two networks learned the same features: layers run on data, and what that shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from merge.alignment.convergent import Convergence, Joint, convergence_of
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["convergence"]

Seen: TypeAlias = "dict[int, list[Tensor]]"

_SAMPLES = 1 << 14
"""Rows of one activation that are used of a batch at most, evenly spread."""


def convergence(
    first: object, second: object, data: object, *, symmetry: object = None
) -> tuple[Convergence, ...]:
    """For each group of units, how alike both networks' are (Convergent Learning, Li et al. 2016).

    first, second: anything `merge.open` takes, of one architecture; widths may differ. data: a
    `merge.Task`, or text as for ``merge barrier --data``; a list of two where modules differ.
    symmetry: a symmetry spec, by default that of the model's type. Each group is looked at once,
    at the first layer that gives it out; units in heads are taken one by one.

    Example::

        for group in merge.convergence("run-a", "run-b", "digits.npz"):
            print(group)
    """
    from merge.alignment.taps import Tap, taps_of, watched
    from merge.statistics.runs import run
    from merge.symmetry.axes import factors_of
    from merge.tasks import pair_of, symmetry_for

    one, two = (open_checkpoint(x) for x in (first, second))
    pair = pair_of(data, one, two)
    specs = [symmetry_for(pair, k, symmetry) for k in range(2)]
    modules = pair.modules()
    theirs = {(t.module, t.output): t for t in taps_of(modules[1], specs[1])}
    places: dict[str, tuple[Tap, Tap]] = {}
    for tap in taps_of(modules[0], specs[0]):
        groups = [f.group for f in factors_of(tap.axis) if f.group is not None]
        like = theirs.get((tap.module, tap.output))
        if tap.output and groups and like is not None:
            places.setdefault(".".join(dict.fromkeys(groups)), (tap, like))
    if not places:
        raise PlanError(
            "no layer shows the activations of a group that may move",
            model=one.label,
            against=two.label,
            do="write the network with torch.nn's layers",
        )
    joints = {name: Joint.empty() for name in places}
    order = list(places)
    for batches in zip(*(t.inputs() for t in pair.tasks), strict=True):
        seen: list[Seen] = [{}, {}]
        for side, (module, batch) in enumerate(zip(modules, batches, strict=True)):

            def look(n: int, value: Tensor, side: int = side, kept: Seen = seen[side]) -> None:
                flat = value.movedim(places[order[n]][side].channel, -1).flatten(0, -2)
                kept.setdefault(n, []).append(flat[:: -(-len(flat) // _SAMPLES)])

            with watched(module, [places[n][side] for n in order], look):
                run(module, batch)
        for n, name in enumerate(order):
            for x, y in zip(seen[0].get(n, ()), seen[1].get(n, ()), strict=True):
                joints[name].add(x, y)
    return tuple(
        convergence_of(name, places[name][0].module, joint)
        for name, joint in joints.items()
        if joint.cross.count
    )
