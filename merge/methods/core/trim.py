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


def largest(tiles: Tiles, wanted: Sequence[tuple[int, int]]) -> list[Trim]:
    """For each (operand, k) of ``wanted`` the `Trim` that keeps the operand's k largest.

    All are found in the same two walks over the tensor.
    """
    n = tiles.numel
    out: list[Trim | None] = [None] * len(wanted)
    for w, (_, k) in enumerate(wanted):
        if k >= n:
            out[w] = Trim(0.0, n)
        elif k <= 0:
            out[w] = Trim(math.inf, -1)
    todo = {w: wanted[w] for w, t in enumerate(out) if t is None}
    if todo:
        for w, found in _by_bracket(tiles, todo).items():
            out[w] = found or _by_radix(tiles, *wanted[w])
    return [t for t in out if t is not None]


def _by_bracket(tiles: Tiles, wanted: dict[int, tuple[int, int]]) -> dict[int, Trim | None]:
    """Sample, count above, collect inside, select; None where the bracket did not hold."""
    import numpy as np

    brackets = _brackets(tiles, wanted)
    budget = tiles.allowance // (len(wanted) + 2)  # pieces of all, one joined, one partitioned
    index = np.uint32 if tiles.numel < 1 << 32 else np.int64
    above = dict.fromkeys(wanted, 0)
    inside: dict[int, list[tuple[Array, Array]]] = {w: [] for w in wanted}
    held = dict.fromkeys(wanted, 0)
    for start, operands in tiles():
        magnitudes = {i: _magnitudes(operands[i]) for i in {i for i, _ in wanted.values()}}
        for w, (i, _) in wanted.items():
            low, high = brackets[w].low, brackets[w].high
            a = magnitudes[i]
            above[w] += int(np.count_nonzero(a > high))
            if held[w] > budget:
                continue
            at = np.flatnonzero((a > low) & (a <= high))
            values, where = a[at], (at + start).astype(index)
            inside[w].append((values, where))
            held[w] += values.nbytes + where.nbytes
    result: dict[int, Trim | None] = {}
    for w, (_, k) in wanted.items():
        rank = k - above[w]
        if rank < 1 or held[w] > budget:
            result[w] = None
            continue
        values, where = (np.concatenate(parts) for parts in zip(*inside.pop(w), strict=True))
        result[w] = _select(values, where, rank, tiles.numel, whole=brackets[w].low == 0.0)
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


def _brackets(tiles: Tiles, wanted: dict[int, tuple[int, int]]) -> dict[int, _Bracket]:
    """For each wanted rank, values that almost surely enclose that operand's k-th magnitude."""
    import numpy as np

    n = tiles.numel
    run = -(-_RUN // tiles.grain) * tiles.grain
    if n <= 2 * _SAMPLES * run:  # small enough to take all of it
        return dict.fromkeys(wanted, _Bracket(0.0, math.inf))
    sample: dict[int, list[Array]] = {i: [] for i, _ in wanted.values()}
    step = n // _SAMPLES // tiles.grain * tiles.grain
    for _, operands in tiles((s * step, s * step + run) for s in range(_SAMPLES)):
        for i, parts in sample.items():
            parts.append(_magnitudes(operands[i]).copy())
    drawn_of = {i: np.sort(np.concatenate(parts)) for i, parts in sample.items()}
    out: dict[int, _Bracket] = {}
    for w, (i, k) in wanted.items():
        drawn, p = drawn_of[i], 1.0 - k / n
        m = drawn.size
        slack = _SURE * math.sqrt(max(p * (1 - p), 1 / m) / m) + 1 / m
        low = drawn[int((p - slack) * m)] if p > slack else drawn[0] * 0
        high = drawn[min(int((p + slack) * m) + 1, m - 1)] if p + slack < 1 - 1 / m else math.inf
        out[w] = _Bracket(float(np.nextafter(low, low * 0)), float(high))
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
