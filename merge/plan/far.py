"""Inputs that are far away: how much of them is held at a time, and what follows for the work."""

from __future__ import annotations

from collections.abc import Sequence

from merge.ir.expr import Distant
from merge.plan.model import Budget, Step, human_bytes

__all__ = ["ahead_bytes", "far_bytes", "far_notes"]

_LEAST = 4 << 20  # bytes


def far_bytes(steps: Sequence[Step]) -> int:
    """Bytes of distinct tensors that are fetched from far away."""
    far = dict.fromkeys(r for s in steps for r in s.reads)
    spans = [r.source.span(r.spec.name) for r in far if isinstance(r.source, Distant)]
    return sum(s.end - s.begin for s in spans if s is not None)


def ahead_bytes(steps: Sequence[Step], limit: int, tiles: int) -> int:
    """Bytes for what is fetched: half of the limit, or what ``tiles`` leave of it."""
    total = far_bytes(steps)
    return max(min(total, limit // 2, limit - tiles), min(total, _LEAST))


def far_notes(steps: Sequence[Step], budget: Budget) -> list[str]:
    """What is fetched more than once, for the plan."""
    large = [s for s in steps if s.passes > 1 and far_bytes([s]) > budget.ahead]
    if not large or not budget.ahead:
        return []
    most = max(s.read_bytes for s in large)
    again = f"up to {max(s.passes for s in large)} times"
    needed = human_bytes(-(-2 * most // 2**20) * 2**20).replace(" ", "")
    return [
        f"the inputs of {len(large)} tensors are fetched {again}, since {human_bytes(budget.ahead)}"
        f" do not hold them; --memory {needed} would, or --download"
    ]
