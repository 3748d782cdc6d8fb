"""Which intermediates are worth holding in memory while their tensor is worked on.

A method that measures walks over its operands several times. An operand that is itself the result
of another method, as of an earlier stage of a recipe, would be computed anew on each walk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from merge.ir.expr import Apply, Expr
from merge.plan.model import Budget, Step, human_bytes

__all__ = ["keep_notes", "kept_bytes", "nearest_applies"]


def nearest_applies(node: Apply) -> Iterator[Apply]:
    """The methods' results that ``node`` is computed from, not those inside them.

    A method that returns coefficients is a plain sum by then, no dearer than reading its operands.
    """
    stack: list[Expr] = list(reversed(node.operands))
    seen: set[int] = set()
    while stack:
        inner = stack.pop()
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        if isinstance(inner, Apply) and not inner.method.coefficients:
            yield inner
        else:
            stack.extend(reversed(inner.operands))


def kept_bytes(nodes: Iterable[Expr], numel: int, wide: int) -> int:
    """Bytes of all intermediates of a tensor that would be computed more than once."""
    measuring = [n for n in nodes if isinstance(n, Apply) and n.method.measure is not None]
    kept = {id(inner) for node in measuring for inner in nearest_applies(node)}
    return len(kept) * numel * wide


def keep_notes(steps: Sequence[Step], budget: Budget) -> list[str]:
    """What becomes of intermediates, for the plan."""
    nested = [s for s in steps if s.kept_bytes]
    if not nested:
        return []
    held = [s for s in nested if s.kept_bytes <= budget.keep]
    notes = []
    if held:
        most = human_bytes(max(s.kept_bytes for s in held))
        notes.append(
            f"{len(held)} tensors hold the result of an earlier stage in memory, up to {most} a"
            " tensor, and compute it once; nothing of it is written to disk"
        )
    if len(held) < len(nested):
        most = human_bytes(budget.workers * 8 * max(s.kept_bytes for s in nested))
        times = max(s.passes for s in nested)
        notes.append(
            f"{len(nested) - len(held)} tensors compute the result of an earlier stage {times}"
            f" times, since it is too large to hold; --memory {most.replace(' ', '')} would hold it"
        )
    return notes
