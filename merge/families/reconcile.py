"""Models of one family that were saved in different ways, brought into the tree of the first.

Three things differ between files that hold the same network: what stands before the names, how
experts are stored, and whether tied heads are there. After these are settled, equal names mean
equal tensors; what is still missing is truly not there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from merge.errors import MergeError
from merge.families.experts import experts_as_in
from merge.families.names import match_names
from merge.families.ties import settle_ties
from merge.ir.checkpoint import Checkpoint

__all__ = ["Part", "followed", "reconcile"]

Part = Callable[[Iterable[str]], Collection[str]]
"""Of some names those that are of a part of the model."""


def reconcile(
    checkpoints: Sequence[Checkpoint], parts: Sequence[Part | None] = ()
) -> list[Checkpoint]:
    """The checkpoints with names, experts and ties as in the first one.

    parts: for each, the part of the first one that it is a model of; None for all of it.
    What was done stands in the notes of each. PlanError where names match in several ways.
    """
    donor = checkpoints[0]
    tree = {n: e.shape for n, e in donor.tensors.items() if n not in donor.folders}
    own = [donor]
    for i, other in enumerate(checkpoints[1:], 1):
        part = parts[i] if parts else None
        seen = tree if part is None else {n: tree[n] for n in part(tree)}
        try:
            own.append(experts_as_in(_renamed(other, donor, seen), donor))
        except MergeError as error:
            raise error.at(model=other.label, against=donor.label) from None
    if not parts:
        return settle_ties(own)
    seen_of = [None if p is None else p(c.tensors) for c, p in zip(own, parts, strict=True)]
    return settle_ties(own, seen_of)


def followed(known: Checkpoint, before: Checkpoint, after: Checkpoint) -> Checkpoint:
    """``known``, which goes by the names of a model, by those that the model was given since."""
    now = {id(e): n for n, e in after.tensors.items()}
    names = {n: now.get(id(e), n) for n, e in before.tensors.items()}
    tensors = {names.get(n, n): e for n, e in known.tensors.items()}
    return replace(known, tensors=tensors)


def _renamed(
    checkpoint: Checkpoint, donor: Checkpoint, tree: dict[str, tuple[int, ...]]
) -> Checkpoint:
    """``checkpoint`` with the names of ``tree``; what lies in folders keeps its name."""
    top = {n: e.shape for n, e in checkpoint.tensors.items() if n not in checkpoint.folders}
    if not top.keys() - tree.keys():
        return checkpoint
    known = _known_to_transformers(checkpoint, donor, top, tree)
    found = match_names({known.get(n, n): shape for n, shape in top.items()}, tree)
    names = {n: found.names.get(known.get(n, n), known.get(n, n)) for n in top}
    if all(n == new for n, new in names.items()):
        return checkpoint
    rules = [*(["transformers' own table"] if known else []), *map(str, found.rules)]
    note = f"names of {checkpoint.label} are read as those of {donor.label}: {'; '.join(rules)}"

    def new(name: str) -> str:
        return names.get(name, name)

    return replace(
        checkpoint,
        tensors={new(n): e for n, e in checkpoint.tensors.items()},
        tied={new(n): new(o) for n, o in checkpoint.tied.items()},
        dropped={new(n): why for n, why in checkpoint.dropped.items()},
        notes=(*checkpoint.notes, note),
    )


def _known_to_transformers(
    checkpoint: Checkpoint, donor: Checkpoint, own: Collection[str], tree: Collection[str]
) -> dict[str, str]:
    """Names that a live model has in files for those it has in memory, or the other way round."""
    known: dict[str, str] = {}
    if donor.stored is not None:
        known |= donor.stored()
    if checkpoint.stored is not None:
        known |= {here: file for file, here in checkpoint.stored().items()}
    return {n: known[n] for n in own if n not in tree and known.get(n) in tree}
