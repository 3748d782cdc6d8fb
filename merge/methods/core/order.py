"""Order statistics of values of either sign: extremes, and the k-th largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merge.methods.core.measure import Derived, Tiles
from merge.methods.core.schema import Operands, Tensor
from merge.methods.core.trim import largest

__all__ = ["Extent", "extents", "kth_largest"]


@dataclass(frozen=True, slots=True)
class Extent:
    """The smallest and the largest value of a tensor, and how many are above 0."""

    low: float
    high: float
    positive: int


def extents(tiles: Tiles) -> list[Extent]:
    """The extent of each operand, in one walk."""
    found = [Extent(math.inf, -math.inf, 0)] * tiles.count
    for _, operands in tiles():
        for i, x in enumerate(operands):
            low, high = (float(v) for v in x.aminmax())
            known, positive = found[i], int((x > 0.0).sum())
            found[i] = Extent(min(known.low, low), max(known.high, high), known.positive + positive)
    return found


def kth_largest(tiles: Tiles, k: int, found: Sequence[Extent]) -> list[float]:
    """The k-th largest value of each operand, 1 <= k <= numel, exactly; ``found``: their extents.

    Selection goes by magnitude. Where the k-th largest is above 0 it is that of the positive part;
    else it is the (n - k + 1)-th largest of the negative part, with its sign.
    """
    n = tiles.numel
    if k in (1, n):  # which also are the ranks that no selection has to be made for
        return [extent.high if k == 1 else extent.low for extent in found]
    sides = [1.0 if extent.positive >= k else -1.0 for extent in found]

    def one_side(_: int, operands: Operands) -> list[Tensor]:
        return [(x * side).clamp_(min=0.0) for x, side in zip(operands, sides, strict=True)]

    ranks = [(i, k if side > 0.0 else n - k + 1) for i, side in enumerate(sides)]
    trims = largest(Derived(tiles, one_side, tiles.count), ranks)
    return [side * trim.threshold for side, trim in zip(sides, trims, strict=True)]
