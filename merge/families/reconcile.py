"""Models of one family that were saved in different ways, brought into the tree of the first.

Three things differ between files that hold the same network: what stands before the names, how
experts are stored, and whether tied heads are there. After these are settled, equal names mean
equal tensors; what is still missing is truly not there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from merge.errors import MergeError
from merge.families.experts import experts_as_in
from merge.families.names import match_names
from merge.families.ties import settle_ties
from merge.ir.checkpoint import Checkpoint

__all__ = ["reconcile"]


def reconcile(
    checkpoints: Sequence[Checkpoint], within: Sequence[Collection[str] | None] = ()
) -> list[Checkpoint]:
    """The checkpoints with names, experts and ties as in the first one.

    within: for each, those of the first one's tensors that it may be a model of; all if None.
    What was done stands in the notes of each. PlanError where names match in several ways.
    """
    donor = checkpoints[0]
    tree = {n: e.shape for n, e in donor.tensors.items() if n not in donor.folders}
    own = [donor]
    for i, other in enumerate(checkpoints[1:], 1):
        part = within[i] if within else None
        seen = tree if part is None else {n: s for n, s in tree.items() if n in part}
        try:
            own.append(experts_as_in(_renamed(other, donor, seen), donor))
        except MergeError as error:
            raise error.at(model=other.label, against=donor.label) from None
    return settle_ties(own)


def _renamed(
    checkpoint: Checkpoint, donor: Checkpoint, tree: dict[str, tuple[int, ...]]
) -> Checkpoint:
    """``checkpoint`` with the names of ``tree``; what lies in folders keeps its name."""
    top = {n: e.shape for n, e in checkpoint.tensors.items() if n not in checkpoint.folders}
    found = match_names(top, tree)
    if not found.names:
        return checkpoint
    rules = "; ".join(map(str, found.rules))
    note = f"names of {checkpoint.label} are read as those of {donor.label}: {rules}"

    def new(name: str) -> str:
        return found.names.get(name, name)

    return replace(
        checkpoint,
        tensors={new(n): e for n, e in checkpoint.tensors.items()},
        tied={new(n): new(o) for n, o in checkpoint.tied.items()},
        dropped={new(n): why for n, why in checkpoint.dropped.items()},
        notes=(*checkpoint.notes, note),
    )
