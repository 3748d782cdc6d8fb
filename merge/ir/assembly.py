"""Take tensors out of checkpoints under other names, and put checkpoints together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Expr

__all__ = ["select", "union"]


def select(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The tensors ``names[new]`` of ``checkpoint`` under the names ``new``, in that order.

    A tie stays where both its names are taken; a name whose first is not taken becomes the tensor.
    """
    new_of = {old: new for new, old in names.items()}
    tied = {
        new: new_of[first]
        for new, old in names.items()
        if (first := checkpoint.tied.get(old)) in new_of
    }
    return replace(
        checkpoint,
        tensors={new: checkpoint.tensors[old] for new, old in names.items()},
        tied=tied,
        folders={n: checkpoint.folders[o] for n, o in names.items() if o in checkpoint.folders},
    )


def union(parts: Sequence[Checkpoint], like: Checkpoint) -> Checkpoint:
    """Checkpoints of different tensors as one, with the side files of ``like``."""
    tensors: dict[str, Expr] = {}
    if len({p.space for p in parts}) > 1:
        raise PlanError(
            "parts of a model are in different spaces",
            found=", ".join(f"{p.label}: {p.space}" for p in parts),
            expected="all weights, or all deltas",
        )
    for part in parts:
        for name, expr in part.tensors.items():
            if name in tensors:
                raise PlanError("two parts of a model hold the same tensor", tensor=name)
            tensors[name] = expr
    dtypes = {p.out_dtype for p in parts}
    return replace(
        like,
        tensors=tensors,
        label=parts[0].label,
        mass=parts[0].mass,
        out_dtype=dtypes.pop() if len(dtypes) == 1 else None,
        tied={n: o for p in parts for n, o in p.tied.items()},
        dropped={n: why for p in parts for n, why in p.dropped.items()},
        folders={n: f for p in parts for n, f in p.folders.items()},
        stems={f: s for p in (*parts, like) for f, s in p.stems.items()},
        notes=tuple(dict.fromkeys(note for p in parts for note in p.notes)),
        roots=tuple(dict.fromkeys(r for p in parts for r in p.roots)),
    )
