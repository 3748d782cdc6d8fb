"""Try the values of one parameter, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint
from merge.learning.score import Score, checked

__all__ = ["Sweep", "sweep"]


@dataclass(frozen=True, slots=True)
class Sweep:
    """The best value with its checkpoint and score, and the whole curve as (value, score)."""

    value: float
    checkpoint: Checkpoint
    score: float
    curve: tuple[tuple[float, float], ...]


def sweep(
    make: Callable[[float], Checkpoint],
    values: Sequence[float],
    score: Score,
    *,
    progress: Callable[[float, float], None] | None = None,
) -> Sweep:
    """The value whose checkpoint ``make(value)`` scores highest; of equal ones the first.

    progress: called with each value and its score.

    Example, the alpha of WiSE-FT on a validation set::

        found = merge.sweep(
            lambda alpha: merge.wise_ft([tuned], base=base, alpha=alpha),
            [i / 20 for i in range(21)],
            lambda checkpoint: accuracy(checkpoint.state_dict()),
        )
    """
    if not values:
        raise PlanError("a sweep over no values", expected="at least one")
    curve: list[tuple[float, float]] = []
    best: tuple[float, float, Checkpoint] | None = None
    for value in values:
        checkpoint = make(value)
        found = checked(score(checkpoint), checkpoint.label)
        curve.append((value, found))
        if progress is not None:
            progress(value, found)
        if best is None or found > best[0]:
            best = (found, value, checkpoint)
    assert best is not None
    return Sweep(best[1], best[2], best[0], tuple(curve))
