"""Scores: how good a checkpoint is, as one number; higher is better."""

from __future__ import annotations

import math
from collections.abc import Callable

from merge.errors import ScoreError
from merge.ir.checkpoint import Checkpoint

__all__ = ["Score", "checked"]

Score = Callable[[Checkpoint], float]


def checked(score: float, label: str) -> float:
    """The score as a float; ScoreError when it is not a number."""
    number = float(score)
    if math.isnan(number):
        raise ScoreError(
            "a score is not a number",
            model=label,
            found=repr(score),
            do="give infinity, of the sign that is worst, for a candidate that fails",
        )
    return number
