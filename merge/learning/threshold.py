"""The magnitude that a share of all of an expert's entries reaches, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merge.learning.store import Differences

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["thresholds"]


def thresholds(source: Differences, names: Sequence[str], density: float) -> tuple[float, ...]:
    """For each expert the int(density N)-th largest magnitude over all tensors, exactly.

    Magnitudes of floats order like their bits: a walk counts the upper 16 bits, further ones the
    next 16 of those that share the upper ones. Infinity where nothing is kept.
    """
    return tuple(_threshold(source, i, names, density) for i in range(source.count))


def _threshold(source: Differences, expert: int, names: Sequence[str], density: float) -> float:
    import numpy as np

    known, shift, width = 0, 0, 0
    rank = 0
    while width == 0 or shift > 0:
        histogram = np.zeros(1 << 16, dtype=np.int64)
        total = 0
        for name in names:
            size = source.delta(expert, name).abs().reshape(-1).cpu().numpy()
            bits: NDArray[Any] = size.view(np.uint64 if size.dtype == np.float64 else np.uint32)
            own = bits.dtype.itemsize * 8
            here = own - 16 if width == 0 else shift - 16
            total += bits.size
            if width:
                bits = bits[(bits >> bits.dtype.type(shift)) == known]
            digit = (bits >> bits.dtype.type(here)) & bits.dtype.type(0xFFFF)
            histogram += np.bincount(digit.astype(np.int64), minlength=1 << 16)
        if width == 0:
            rank = min(total, int(density * total)) or (1 if density > 0 else 0)
            if rank == 0:
                return float("inf")
            width, shift = own, own
        from_top = np.cumsum(histogram[::-1])
        place = int(np.searchsorted(from_top, rank))
        rank -= int(from_top[place - 1]) if place else 0
        known = (known << 16) | (0xFFFF - place)
        shift -= 16
    unsigned = np.uint64 if width == 64 else np.uint32
    kind = np.float64 if width == 64 else np.float32
    return float(np.asarray([known], dtype=unsigned).view(kind)[0])
