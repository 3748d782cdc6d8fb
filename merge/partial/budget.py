"""How many units of each group stay apart, so that a network costs no more than it may.

A block of a tensor whose axes have n_1, n_2, ... units, of which m_1, m_2, ... are common to both
networks, has ``2 n_1 n_2 ... - m_1 m_2 ...`` numbers that need not be zero: what leads from one
network's own units to the other's is zero, and is not counted. With nothing in common that is twice
one network. A cost weighs each number by how often it is used, so that the same sum stands for
parameters and for multiplications.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.errors import PlanError
from merge.symmetry.symmetry import Symmetry, blocks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Place", "chosen", "cost", "places_of"]

_STEPS = 32
"""In how many steps a group is taken apart before single units are looked at."""

_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Place:
    """A block of a tensor: how many units of which kinds on its axes, other entries, its weight."""

    units: tuple[tuple[str, int], ...]
    rest: int
    weight: float = 1.0

    def cost(self, apart: Mapping[str, int]) -> float:
        """With that many units of each kind apart."""
        whole = math.prod(n for _, n in self.units)
        common = math.prod(n - apart.get(kind, 0) for kind, n in self.units)
        return self.weight * self.rest * (2 * whole - common)


def places_of(
    symmetry: Symmetry, kinds: Mapping[str, str], weights: Mapping[str, float]
) -> list[Place]:
    """The blocks of the tensors in ``weights``. kinds: of groups that may be taken apart; groups of
    one kind have as many units apart."""
    found = []
    for name, weight in weights.items():
        for block in blocks(symmetry.tensors[name].axes):
            units = tuple((kinds[str(f.group)], f.size) for f in block if f.group in kinds)
            rest = math.prod(f.size for f in block if f.group not in kinds)
            found.append(Place(units, rest, weight))
    return found


def cost(places: Sequence[Place], apart: Mapping[str, int]) -> float:
    """Of the whole network."""
    return math.fsum(p.cost(apart) for p in places)


def chosen(
    places: Sequence[Place], gains: Mapping[str, NDArray[np.float64]], budget: float
) -> dict[str, int]:
    """How many units of each kind stay apart: of the largest ``sum of gains`` found at a cost of at
    most ``budget`` times that of one network.

    gains: of each kind, what it is worth that its units stay apart, from the largest to the least.
    Greedily by gain over cost, in steps of 1/32 of a group and then single units; then units are
    exchanged between two kinds as long as that is worth something. The costs are exact, and those
    of neighbours depend on one another. PlanError for a budget below 1.
    """
    if not budget >= 1:
        raise PlanError(
            "two networks cannot be merged into less than one of them",
            found=f"a budget of {budget:g}",
            expected="1 (the size of one network) to 2 (both side by side)",
        )
    counts = dict.fromkeys(gains, 0)
    most = budget * cost(places, counts) * (1 + 1e-12)
    search = _Search(places, gains, most)
    for steps in (_STEPS, max((len(g) for g in gains.values()), default=1)):
        while search.grow(counts, steps):
            pass
    for _ in range(_ROUNDS):
        if not search.exchange(counts):
            break
    return counts


class _Search:
    """Kinds whose counts grow and shrink within a cost."""

    def __init__(
        self, places: Sequence[Place], gains: Mapping[str, NDArray[np.float64]], most: float
    ) -> None:
        import numpy as np

        self._places = places
        self._sums = {k: np.concatenate([[0.0], np.cumsum(g)]) for k, g in gains.items()}
        self._by_kind = {k: [p for p in places if any(u == k for u, _ in p.units)] for k in gains}
        self._most = most

    def _added(self, counts: Mapping[str, int], kind: str, count: int) -> float:
        """What it costs that ``count`` units of a kind are apart, instead of those that are."""
        after = {**counts, kind: count}
        return math.fsum(p.cost(after) - p.cost(counts) for p in self._by_kind[kind])

    def grow(self, counts: dict[str, int], steps: int) -> bool:
        """Take apart what is worth most for its cost; False where nothing fits."""
        used = cost(self._places, counts)
        best: tuple[float, str, int] | None = None
        for kind, now in counts.items():
            size = len(self._sums[kind]) - 1
            after = min(size, now + max(1, size // steps))
            added = self._added(counts, kind, after)
            if after == now or used + added > self._most:
                continue
            worth = float(self._sums[kind][after] - self._sums[kind][now]) / max(added, 1e-300)
            if best is None or worth > best[0]:
                best = (worth, kind, after)
        if best is not None:
            counts[best[1]] = best[2]
        return best is not None

    def exchange(self, counts: dict[str, int]) -> bool:
        """Units of one kind made common so that others of another kind may stay apart."""
        better = False
        for less, more in itertools.permutations(counts, 2):
            for share in (8, 32, len(self._sums[less]) - 1):
                step = max(1, (len(self._sums[less]) - 1) // share)
                if counts[less] < step:
                    continue
                trial = {**counts, less: counts[less] - step}
                trial[more] = self._largest(trial, more)
                if self._value(trial) > self._value(counts) * (1 + 1e-12):
                    counts.update(trial)
                    better = True
        return better

    def _largest(self, counts: Mapping[str, int], kind: str) -> int:
        """The most units of a kind that fit, by halving: costs only grow with them."""
        room = self._most - cost(self._places, counts)
        low, high = counts[kind], len(self._sums[kind]) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._added(counts, kind, middle) <= room:
                low = middle
            else:
                high = middle - 1
        return low

    def _value(self, counts: Mapping[str, int]) -> float:
        return math.fsum(float(self._sums[k][n]) for k, n in counts.items())
