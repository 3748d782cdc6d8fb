"""Keep the k largest magnitudes of a tensor, exactly, without sorting and in bounded memory.

The k-th largest magnitude is found by selection: a small sample gives a narrow bracket around it,
one pass counts what lies above the bracket and collects what lies inside, and the k-th is
selected among those. Equal magnitudes are common (about 2 % of the deltas of bfloat16 models equal
the threshold), so ties are kept in order of flat index until k elements are kept: the result
is exact and does not depend on sample, tiles or threads. Where a sample misleads, or the bracket
holds more than the allowance (a tensor of few distinct values), a radix count takes over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.methods.core.measure import Tiles
from merge.methods.core.schema import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Trim", "kept_count", "largest", "trim"]

_SAMPLES, _RUN = 64, 2048  # runs of neighbours, spread evenly; elements of a run
_SURE = 5.0  # half width of the bracket, in standard deviations of the sampled rank


@dataclass(frozen=True, slots=True)
class Trim:
    """What is kept: magnitudes above ``threshold``, and those equal to it up to index ``last``."""

    threshold: float
    last: int


def kept_count(density: float, numel: int) -> int:
    """How many of ``numel`` elements a density keeps: truncated, but at least 1 unless 0."""
    if density >= 1.0:
        return numel
    return max(1, int(density * numel)) if density > 0.0 else 0


def trim(x: Tensor, measured: Trim, start: int) -> Tensor:
    """``x`` with everything zeroed that ``measured`` does not keep.

    ``start`` is the flat index of the first element of the tile ``x``.
    """
    import torch

    shrink = torch.nn.functional.hardshrink  # keeps |x| > lambda
    if measured.threshold == math.inf:
        return torch.zeros_like(x)
    at_threshold = torch.nextafter(
        torch.tensor(measured.threshold, dtype=x.dtype), torch.tensor(0.0, dtype=x.dtype)
    ).item()
    with_ties = min(max(measured.last + 1 - start, 0), x.numel())
    if with_ties == x.numel():
        return x if measured.threshold == 0.0 else shrink(x, at_threshold)
    if with_ties == 0:
        return shrink(x, measured.threshold)
    flat = x.reshape(-1)
    parts = (shrink(flat[:with_ties], at_threshold), shrink(flat[with_ties:], measured.threshold))
    return torch.cat(parts).view_as(x)


def largest(tiles: Tiles, counts: Sequence[int]) -> list[Trim]:
    """For each operand, the `Trim` that keeps its ``counts[i]`` largest magnitudes."""
    n = tiles.numel
    out: list[Trim | None] = [None] * tiles.count
    for i, k in enumerate(counts):
        if k >= n:
            out[i] = Trim(0.0, n)
        elif k <= 0:
            out[i] = Trim(math.inf, -1)
    todo = [i for i, t in enumerate(out) if t is None]
    if todo:
        for i, found in _by_bracket(tiles, {i: counts[i] for i in todo}).items():
            out[i] = found or _by_radix(tiles, i, counts[i])
    return [t for t in out if t is not None]


def _by_bracket(tiles: Tiles, counts: dict[int, int]) -> dict[int, Trim | None]:
    """Sample, count above, collect inside, select; None where the bracket did not hold."""
    import numpy as np

    brackets = _brackets(tiles, counts)
    budget = tiles.allowance // (len(counts) + 2)  # pieces of all, one joined, one partitioned
    index = np.uint32 if tiles.numel < 1 << 32 else np.int64
    above = dict.fromkeys(counts, 0)
    inside: dict[int, list[tuple[Array, Array]]] = {i: [] for i in counts}
    held = dict.fromkeys(counts, 0)
    for start, operands in tiles():
        for i in counts:
            low, high = brackets[i].low, brackets[i].high
            a = _magnitudes(operands[i])
            above[i] += int(np.count_nonzero(a > high))
            if held[i] > budget:
                continue
            at = np.flatnonzero((a > low) & (a <= high))
            values, where = a[at], (at + start).astype(index)
            inside[i].append((values, where))
            held[i] += values.nbytes + where.nbytes
    result: dict[int, Trim | None] = {}
    for i, k in counts.items():
        rank = k - above[i]
        if rank < 1 or held[i] > budget:
            result[i] = None
            continue
        values, where = (np.concatenate(parts) for parts in zip(*inside.pop(i), strict=True))
        result[i] = _select(values, where, rank, tiles.numel, whole=brackets[i].low == 0.0)
    return result


def _select(values: Array, index: Array, rank: int, numel: int, *, whole: bool) -> Trim | None:
    """The rank-th largest of ``values`` and the index of the last tie that is kept."""
    import numpy as np

    if rank > values.size:  # below the bracket: zeros if it reached down to them
        return Trim(0.0, numel) if whole else None
    threshold = np.partition(values, values.size - rank)[values.size - rank]
    ties = index[values == threshold]
    keep = rank - int(np.count_nonzero(values > threshold))
    return Trim(float(threshold), int(ties[keep - 1]))


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Magnitudes above ``low`` and up to ``high``; from 0 it reaches down to every nonzero one."""

    low: float
    high: float


def _brackets(tiles: Tiles, counts: dict[int, int]) -> dict[int, _Bracket]:
    """For each operand, values that almost surely enclose its k-th largest magnitude."""
    import numpy as np

    n = tiles.numel
    if n <= 2 * _SAMPLES * _RUN:  # small enough to take all of it
        return dict.fromkeys(counts, _Bracket(0.0, math.inf))
    sample: dict[int, list[Array]] = {i: [] for i in counts}
    step = n // _SAMPLES
    for _, operands in tiles((s * step, s * step + _RUN) for s in range(_SAMPLES)):
        for i in counts:
            sample[i].append(_magnitudes(operands[i]).copy())
    out: dict[int, _Bracket] = {}
    for i, k in counts.items():
        drawn = np.sort(np.concatenate(sample[i]))
        m, p = drawn.size, 1.0 - k / n
        slack = _SURE * math.sqrt(max(p * (1 - p), 1 / m) / m) + 1 / m
        low = drawn[int((p - slack) * m)] if p > slack else drawn[0] * 0
        high = drawn[min(int((p + slack) * m) + 1, m - 1)] if p + slack < 1 - 1 / m else math.inf
        out[i] = _Bracket(float(np.nextafter(low, low * 0)), float(high))
    return out


def _by_radix(tiles: Tiles, operand: int, k: int) -> Trim:
    """The same by counting: 16 bits of the magnitude a pass, then one pass to place the ties.

    Magnitudes of one sign order like their bits seen as integers.
    """
    import numpy as np

    known, rank, shift = 0, k, None
    while shift is None or shift > 0:
        histogram = np.zeros(1 << 16, dtype=np.int64)
        for _, operands in tiles():
            bits = _bits(_magnitudes(operands[operand]))
            width = bits.dtype.itemsize * 8
            here = width - 16 if shift is None else shift - 16
            if shift is not None:
                bits = bits[(bits >> bits.dtype.type(shift)) == known]
            digit = (bits >> bits.dtype.type(here)) & bits.dtype.type(0xFFFF)
            histogram += np.bincount(digit.astype(np.int64), minlength=1 << 16)
        from_top = np.cumsum(histogram[::-1])
        place = int(np.searchsorted(from_top, rank))
        rank -= int(from_top[place - 1]) if place else 0
        known = (known << 16) | (0xFFFF - place)
        shift = here
    for start, operands in tiles():
        a = _magnitudes(operands[operand])
        ties = np.flatnonzero(_bits(a) == known)
        if rank <= ties.size:
            return Trim(_value(known, a.dtype), start + int(ties[rank - 1]))
        rank -= ties.size
    raise AssertionError("the counted ties were not met again: the tensor changed meanwhile")


def _magnitudes(x: Tensor) -> Array:
    out: Array = x.abs().reshape(-1).cpu().numpy()
    return out


def _bits(a: Array) -> Array:
    import numpy as np

    bits: Array = a.view(np.uint64 if a.dtype == np.float64 else np.uint32)
    return bits


def _value(bits: int, kind: np.dtype[Any]) -> float:
    import numpy as np

    unsigned = np.uint64 if kind == np.float64 else np.uint32
    return float(np.asarray([bits], dtype=unsigned).view(kind)[0])
