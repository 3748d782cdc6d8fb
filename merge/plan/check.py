"""Refuse what cannot work, before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence

from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint, some
from merge.ir.derived import BlockScaled, Concat, LowRank, Reorder, Whole, Window
from merge.ir.dtypes import DType
from merge.ir.expr import Expr, Read, Same
from merge.ir.side import Side
from merge.plan.model import Step

__all__ = ["check", "notes"]

_MOVED = Read | Same | Window | Concat | Reorder
"""What is copied as it is stored, whatever the type."""


def check(checkpoint: Checkpoint) -> None:
    """PlanError unless the result is weights or a delta, of types that can be computed."""
    if not checkpoint.tensors:
        raise PlanError("there is nothing to write: no tensors", model=checkpoint.label)
    if checkpoint.space == "neither":
        raise PlanError(
            "the result is neither weights nor a difference of weights",
            model=checkpoint.label,
            found=f"{checkpoint.mass:g} times a model's weights",
            expected="1 (weights) or 0 (a delta)",
            do="add a difference instead, as in base + (tuned - base), or average: merge.linear",
        )
    for name, expr in checkpoint.tensors.items():
        if expr.dtype.bits % 8:
            raise PlanError(
                "a tensor holds packed numbers, several to a byte",
                tensor=name,
                found=expr.dtype.name,
                do="use the model that this one was quantised from",
            )
        if (
            not isinstance(expr, Read | Same | Window | Concat | Reorder)
            and expr.dtype.kind != "float"
        ):
            raise PlanError(
                "a tensor's type has no arithmetic here",
                tensor=name,
                found=expr.dtype.name,
                expected="a float type",
            )


def notes(checkpoint: Checkpoint, steps: Sequence[Step]) -> list[str]:
    """What a user may want to know, though nothing is wrong."""
    out = []
    mixed = sum(len(_types(s.expr)) > 1 for s in steps)
    if mixed:
        out.append(
            f"{mixed} tensors mix element types: computed in float32 or wider, stored as the widest"
            " unless a dtype is given"
        )
    if checkpoint.tied:
        pairs = ", ".join(f"{a} = {b}" for a, b in list(checkpoint.tied.items())[:3])
        out.append(f"tied, written once: {pairs}")
    by_reason: dict[str, list[str]] = {}
    for name, why in checkpoint.dropped.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        out.append(f"dropped, since {why}: {some(names)}")
    if checkpoint.side.left:
        out.append(f"not copied: {some(checkpoint.side.left)}")
    out += _code_notes(checkpoint.side)
    return [*checkpoint.notes, *out]


def _types(expr: Expr) -> set[DType]:
    """Types of the tensors that are merged, each as its model has it: codes and scales are one."""
    found: set[DType] = set()
    stack: list[Expr] = [expr]
    while stack:
        node = stack.pop()
        if isinstance(node, Read | LowRank | BlockScaled | Whole):
            found.add(node.dtype)
        else:
            stack += dict.fromkeys(node.operands)
    return found


def _code_notes(side: Side) -> list[str]:
    """What becomes of the programs that came with the model."""
    if not side.code:
        return []
    names = some([f.name for f in side.code])
    if side.code[0] in side.files:
        return [f"copied: {names}: programs, so read them before you let a library run them"]
    needed = ", which auto_map in config.json says that the model needs"
    return [
        f"not copied: {names}: programs{needed if 'auto_map' in side.config else ''}"
        " (--copy-code copies them)"
    ]
