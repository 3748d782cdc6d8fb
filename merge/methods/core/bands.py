"""Keep the magnitudes between two ranks of a tensor, exactly: for the breadcrumbs family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge.methods.core.consensus import l1_ratios
from merge.methods.core.measure import Tiles
from merge.methods.core.schema import Tensor
from merge.methods.core.trim import Trim, largest, trim

__all__ = ["Band", "band", "bands"]


@dataclass(frozen=True, slots=True)
class Band:
    """What is kept: all that ``outer`` keeps but for the outliers, which ``inner`` keeps too."""

    outer: Trim
    inner: Trim


def band(x: Tensor, kept: Band, start: int) -> Tensor:
    """``x``, a tile that begins at flat index ``start``, with all zeroed that is not ``kept``."""
    return trim(x, kept.outer, start) - trim(x, kept.inner, start)  # x - x or x - 0: both exact


def bands(
    tiles: Tiles,
    *,
    density: Sequence[float],
    gamma: Sequence[float],
    rescale: bool = False,
    **_: object,
) -> tuple[list[Band], list[float]]:
    """The band of each operand, and what restores its L1 norm (1 without ``rescale``)."""
    counts = [_counts(d, g, tiles.numel) for d, g in zip(density, gamma, strict=True)]
    wanted = [(i, k) for i, pair in enumerate(counts) for k in pair]
    cuts = largest(tiles, wanted)
    found = [Band(*pair) for pair in zip(cuts[::2], cuts[1::2], strict=True)]
    thinned = [i for i, p in enumerate(density) if rescale and p < 1.0]
    return found, l1_ratios(tiles, thinned, lambda i, start, x: band(x, found[i], start))


def _counts(density: float, gamma: float, numel: int) -> tuple[int, int]:
    """How many of the largest hold both band and outliers, and how many the outliers alone.

    Where the two do not fit into the tensor, the band reaches down to its smallest element.
    """
    keep = numel if density >= 1.0 else int(density * numel)
    outer = min(numel, keep + int(gamma * numel))
    return outer, outer - keep
