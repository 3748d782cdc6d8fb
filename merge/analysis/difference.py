"""How far apart two sets of weights are: distance, cosine, signs, from sums over tiles.

For tensors a and b, and their changes u = a - base, v = b - base where there is a base (else u = a,
v = b):

- distance: ||a - b||, the Euclidean norm over all elements; relative: that over ||a||;
- cosine: <u, v> / (||u|| ||v||), in [-1, 1];
- signs: among elements where neither u nor v is 0, the share of those with equal sign;
- equal: the share of elements in which a and b are the same.

Sums are taken in float64, tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.analysis.figure import COLOURS, figure
from merge.families.layers import place_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Distance", "Sums", "by_layer", "draw_distances", "sums_of", "total"]


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over elements: of squares of the difference and of a, u and v, of the products u v;
    counts of all, of equal elements, of those with two signs and of those with equal ones."""

    difference: float = 0.0
    first: float = 0.0
    u: float = 0.0
    v: float = 0.0
    product: float = 0.0
    count: float = 0.0
    equal: float = 0.0
    signed: float = 0.0
    agreeing: float = 0.0


@dataclass(frozen=True, slots=True)
class Distance:
    """How far apart two tensors, or groups of them, are. nan where nothing could be said."""

    name: str
    tensors: int
    parameters: int
    distance: float
    relative: float
    cosine: float
    signs: float
    equal: float

    @classmethod
    def of(cls, name: str, sums: Sequence[Sums]) -> Distance:
        """From the sums of each tensor."""
        s = total(sums)
        norms = math.sqrt(s.u) * math.sqrt(s.v)
        return cls(
            name,
            len(sums),
            round(s.count),
            math.sqrt(s.difference),
            _over(math.sqrt(s.difference), math.sqrt(s.first)),
            max(-1.0, min(1.0, _over(s.product, norms))) if norms else math.nan,
            _over(s.agreeing, s.signed),
            _over(s.equal, s.count),
        )


def _over(value: float, by: float) -> float:
    return value / by if by else math.nan


def total(parts: Iterable[Sums]) -> Sums:
    """The sum of sums, exact whatever their order."""
    listed = list(parts)
    return Sums(*(math.fsum(getattr(p, f.name) for p in listed) for f in fields(Sums)))


def sums_of(tensors: Sequence[Tensor]) -> Sums:
    """The sums of one tile: of a, b and, as a third, the base."""
    a, b = (t.double().reshape(-1) for t in tensors[:2])
    u, v = a, b
    if len(tensors) > 2:
        base = tensors[2].double().reshape(-1)
        u, v = a - base, b - base
    apart = a - b
    both = (u != 0) & (v != 0)
    return Sums(
        float(apart @ apart),
        float(a @ a),
        float(u @ u),
        float(v @ v),
        float(u @ v),
        float(a.numel()),
        float((a == b).sum()),
        float(both.sum()),
        float((both & ((u > 0) == (v > 0))).sum()),
    )


def by_layer(tensors: Mapping[str, Sums]) -> list[Distance]:
    """A row for each layer, and one for what is in none, in the order of the tensors."""
    groups: dict[str, list[Sums]] = {}
    for name, sums in tensors.items():
        place = place_of(name)
        groups.setdefault("(no layer)" if place is None else f"{place[0]}.{place[1]}", []).append(
            sums
        )
    return [Distance.of(name, parts) for name, parts in groups.items()]


def draw_distances(path: Path, rows: Sequence[Distance], title: str) -> Path:
    """Draw relative distance, cosine and agreement of signs of each row into a file."""
    height = min(24.0, max(3.2, 0.24 * len(rows) + 1.8))
    with figure(path, 10.0, height) as drawn:
        left, right = drawn.subplots(1, 2, sharey=True)
        places = list(range(len(rows)))
        every = -(-len(rows) // 60)
        left.barh(places, [r.relative for r in rows], color=COLOURS[1], height=0.7)
        left.set_xlabel("||a - b|| / ||a||")
        left.set_yticks(places[::every], [r.name for r in rows][::every], fontsize=7)
        left.invert_yaxis()
        _marks(right, places, [r.cosine for r in rows], COLOURS[0], "cosine")
        _marks(right, places, [r.signs for r in rows], COLOURS[2], "equal signs")
        least = min((r.cosine for r in rows if r.cosine == r.cosine), default=0.0)
        right.set_xlim(min(0.0, least) - 0.02, 1.02)
        right.legend(fontsize=8, frameon=False, loc="best")
        drawn.suptitle(title, fontsize=10)
    return path


def _marks(axes: Any, places: Sequence[int], values: Sequence[float], colour: str, of: str) -> None:
    axes.plot(values, places, "o-", color=colour, markersize=4, linewidth=0.8, label=of)
