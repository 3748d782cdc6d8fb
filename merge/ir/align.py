"""Checkpoints seen as one: the tensors that all of them hold, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge.errors import PlanError
from merge.ir.dtypes import DType
from merge.ir.expr import Expr

if TYPE_CHECKING:
    from merge.ir.checkpoint import Checkpoint

__all__ = ["Aligned", "Missing", "align_names", "is_rebuilt", "short", "some"]

Missing = Literal["error", "base", "skip"]
"""What becomes of a tensor that not every model holds.

``error``: it is refused. ``base``: the first model's is taken as it is. ``skip``: it is merged
among the models that hold it. What the first model lacks is dropped in the last two.
"""

_REBUILT = ("position_ids", "rotary_emb.inv_freq", "masked_bias")
"""Ends of the names of constants that models rebuild; some library versions do not store them."""

_MASKS = ("attn.bias", "attention.bias")
"""How GPT-2's and GPT-NeoX's causal masks end, of shape (1, 1, length, length)."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """Checkpoints seen as one: the names that all share, and how the odd ones were settled.

    partial: those of the names that some checkpoint lacks.
    """

    names: tuple[str, ...]
    partial: frozenset[str]
    dropped: Mapping[str, str]
    tied: Mapping[str, str]
    out_dtype: DType | None
    notes: tuple[str, ...]
    roots: tuple[str, ...]
    _owner: Mapping[str, str]

    def expr(self, checkpoint: Checkpoint, name: str) -> Expr:
        """The tensor ``name`` of one of the checkpoints, under the name of its tie if need be."""
        found = checkpoint.tensors.get(name)
        return checkpoint.tensors[self._owner[name]] if found is None else found

    def holds(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether a checkpoint has the tensor, be it under the name of its tie."""
        return name in checkpoint.tensors or self._owner.get(name) in checkpoint.tensors


def align_names(checkpoints: Sequence[Checkpoint], missing: Missing = "error") -> Aligned:
    """The tensors of the first checkpoint, which all others must have too, with its shapes.

    Constants that a model rebuilds by itself may be missing anywhere and are then dropped. A name
    that is tied to another in one model may be missing in the next, which was saved with the tie;
    it stays tied when no model has a value of its own for it. ``missing`` says what becomes of
    other names that not all have; by default PlanError names the first few of each kind.
    """
    first = checkpoints[0]
    owner = {n: o for c in checkpoints for n, o in c.tied.items()}
    every = [n for c in checkpoints for n, e in c.tensors.items() if is_rebuilt(n, e.shape)]
    rebuilt = {n for n in every if any(n not in c.tensors for c in checkpoints)}
    names = [n for n in dict.fromkeys([*first.tensors, *owner]) if n not in rebuilt]
    tied = {
        n: o
        for n, o in owner.items()
        if all(n not in c.tensors or c.tied.get(n) == o for c in checkpoints)
    }
    dropped = {n: why for c in checkpoints for n, why in c.dropped.items()}
    dropped |= dict.fromkeys(sorted(rebuilt), "the model rebuilds it, and not every input holds it")
    partial: dict[str, None] = {}
    for other in checkpoints:
        lacking = [n for n in names if n not in other.tensors]
        lacking = [n for n in lacking if owner.get(n) not in other.tensors]
        extra = [n for n in other.tensors if n not in first.tensors]
        extra = [n for n in extra if n not in rebuilt and n not in owner]
        if missing == "error" and (lacking or extra):
            raise _not_the_same(first, other, lacking, extra)
        partial.update(dict.fromkeys(lacking))
        why = f"{short(first.label)} has no such tensor ({short(other.label)} has)"
        dropped |= dict.fromkeys(extra, why)
    dtypes = {c.out_dtype for c in checkpoints}
    aligned = Aligned(
        tuple(names),
        frozenset(partial),
        dropped,
        tied,
        dtypes.pop() if len(dtypes) == 1 else None,
        tuple(dict.fromkeys(note for c in checkpoints for note in c.notes)),
        tuple(dict.fromkeys(r for c in checkpoints for r in c.roots)),
        owner,
    )
    for other in checkpoints[1:]:
        for name in names:
            if partial and not (aligned.holds(first, name) and aligned.holds(other, name)):
                continue
            wanted, shape = aligned.expr(first, name).shape, aligned.expr(other, name).shape
            if shape != wanted:
                raise PlanError(
                    "a tensor has different shapes",
                    tensor=name,
                    found=f"{list(shape)} in {other.label}",
                    expected=f"{list(wanted)} as in {first.label}",
                    do=_shape_advice(name, wanted, shape),
                )
    return aligned


def is_rebuilt(name: str, shape: Sequence[int] = ()) -> bool:
    """Whether a tensor is a constant that models rebuild, so that not every file holds it.

    shape: without it, causal masks, which it tells from biases, are none.
    """
    mask = name.endswith(_MASKS) and len(shape) == 4 and tuple(shape[:2]) == (1, 1)
    return mask or name.endswith(_REBUILT)


def _not_the_same(
    first: Checkpoint, other: Checkpoint, lacking: Sequence[str], extra: Sequence[str]
) -> PlanError:
    kinds = (("missing", lacking), ("extra", extra))
    return PlanError(
        "the models do not hold the same tensors",
        model=other.label,
        against=first.label,
        found="; ".join(f"{len(odd)} {kind}: {some(odd)}" for kind, odd in kinds if odd),
        expected=f"the {len(first)} tensors of {first.label}",
        do="check that both are models of the same architecture; missing: base takes what is not in"
        " every model from the first one, missing: skip merges it among those that have it",
    )


def _shape_advice(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> str:
    outside = not any(word.isdigit() for word in name.split("."))
    if outside and len(a) == len(b) == 2 and a[1] == b[1]:
        return "the row counts differ, as when a vocabulary grew; try `tokenizer_source: union`"
    if len(a) == len(b) == 2 and a == b[::-1]:
        return "one is the transpose of the other; were both saved by the same library?"
    return "merge models of the same architecture and size"


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few names as text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short(label: str) -> str:
    """The last part of a path, or a text that is no path as it is."""
    return label if label.endswith(")") else label.rstrip("/").rpartition("/")[2] or label
