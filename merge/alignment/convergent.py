"""Whether two networks learned the same features: one to one, few to one, in groups, or not at all.

Convergent Learning (Li et al. 2016, arXiv:1511.07543) on correlations alone: the best partner of
each unit with and without sharing it, how few units of one network predict one of the other, and
which units of both go together. All of it comes from three accumulators; the data is seen once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from merge.alignment.moments import Moments
from merge.alignment.solvers import assign

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Cluster", "Convergence", "Joint", "Sparse", "convergence_of", "lasso"]

PENALTIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
"""Of the L1 norm, for units of variance 1."""

_TARGETS = 256
"""Units that are predicted at most, evenly spread."""

_UNITS = 4096
"""Units of both networks together that are put into clusters at most."""

TOGETHER = 0.5
"""Units whose correlation is above this, on average over their clusters, are of one cluster."""


@dataclass(slots=True)
class Joint:
    """Moments of a layer's units within each network and between both."""

    ours: Moments
    theirs: Moments
    cross: Moments

    @classmethod
    def empty(cls) -> Joint:
        """Nothing seen so far."""
        return cls(Moments(), Moments(), Moments())

    def add(self, a: Any, b: Any) -> None:
        """Add samples: a (samples, n) and b (samples, m)."""
        self.ours.add(a, a)
        self.theirs.add(b, b)
        self.cross.add(a, b)


@dataclass(frozen=True, slots=True)
class Sparse:
    """How well few units predict one. units: used on average for one unit; left: the mean share of
    its variance that they do not explain, between 0 and 1."""

    penalty: float
    units: float
    left: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Numbers of units of the first and the second network that go together."""

    first: tuple[int, ...]
    second: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Convergence:
    """One group of units. matched: correlations of an assignment, the largest first. best: the
    largest correlation of each unit of the first network with any, partners shared. gap: mean of
    best less matched; large where features are not one to one. sparse: how well few units of the
    first network predict one of the second. clusters: of more than one unit, the largest first.
    """

    group: str
    layer: str
    samples: int
    matched: tuple[float, ...]
    best: tuple[float, ...]
    gap: float
    sparse: tuple[Sparse, ...]
    clusters: tuple[Cluster, ...]
    kinds: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        def mean(values: Sequence[float]) -> float:
            return sum(values) / max(1, len(values))

        lines = [
            f"{self.group} at {self.layer}: correlation {mean(self.matched):.3f} one to one,"
            f" {mean(self.best):.3f} shared, gap {self.gap:.3f} ({self.samples} samples)"
        ]
        spots = [self.matched[len(self.matched) * k // 4] for k in range(4)]
        lines.append(f"  matched: {' '.join(f'{v:.2f}' for v in spots)} ... {self.matched[-1]:.2f}")
        told = ", ".join(f"{s.units:.1f} units leave {s.left:.2f}" for s in self.sparse)
        lines.append(f"  predicted: {told}")
        lines.append("  clusters: " + ", ".join(f"{n} {kind}" for kind, n in self.kinds))
        return "\n".join(lines)


def convergence_of(group: str, layer: str, joint: Joint) -> Convergence:
    """What the moments of a layer say of its units in both networks."""
    import numpy as np

    cross = joint.cross.correlation().cpu().numpy()
    within = [m.correlation().cpu().numpy() for m in (joint.ours, joint.theirs)]
    n, m = cross.shape
    # of different widths the narrower one's units each get one of their own
    padded = np.full((max(n, m), max(n, m)), -2.0)
    padded[:n, :m] = cross
    index = assign(padded).index
    rows = [i for i in range(n) if index[i] < m]
    matched = cross[rows, index[rows]]
    best = cross.max(axis=1)
    clusters, kinds = _clusters(cross, *within)
    return Convergence(
        group,
        layer,
        joint.cross.count,
        tuple(float(v) for v in np.sort(matched)[::-1]),
        tuple(float(v) for v in best),
        float((best[rows] - matched).mean()),
        tuple(_predicted(within[0], cross)),
        clusters,
        kinds,
    )


def _predicted(gram: NDArray[Any], cross: NDArray[Any]) -> list[Sparse]:
    import numpy as np

    step = -(-cross.shape[1] // _TARGETS)
    wanted = cross[:, ::step]
    alive = (np.abs(wanted) > 0).any(axis=0)
    wanted = wanted[:, alive]
    out = []
    found = np.zeros_like(wanted)
    for penalty in PENALTIES:
        found = lasso(gram, wanted, penalty, found)
        left = 1.0 - 2.0 * (found * wanted).sum(0) + (found * (gram @ found)).sum(0)
        units = float((found != 0).sum(0).mean()) if wanted.size else 0.0
        out.append(Sparse(penalty, units, float(left.clip(0.0).mean()) if wanted.size else 1.0))
    return out


def lasso(
    gram: NDArray[Any],
    cross: NDArray[Any],
    penalty: float,
    start: NDArray[Any] | None = None,
    *,
    rounds: int = 200,
    tolerance: float = 1e-6,
) -> NDArray[Any]:
    """The coefficients W (n, m) of least ``1/2 tr(W' G W) - tr(C' W) + penalty |W|_1``.

    gram: G (n, n), products of the predictors; cross: C (n, m), of predictors and targets. Cyclic
    coordinate descent (Friedman et al. 2010) for all targets at once.
    """
    import numpy as np

    found = np.zeros_like(cross) if start is None else start.copy()
    left = cross - gram @ found
    size = np.diag(gram)
    for _ in range(rounds):
        moved = 0.0
        for j in range(len(gram)):
            if size[j] <= 0:
                continue
            old = found[j].copy()
            wish = left[j] + size[j] * old
            found[j] = np.sign(wish) * np.maximum(np.abs(wish) - penalty, 0.0) / size[j]
            step = found[j] - old
            largest = float(np.abs(step).max(initial=0.0))
            if largest:
                left -= np.outer(gram[:, j], step)
                moved = max(moved, largest)
        if moved < tolerance:
            break
    return found


def _clusters(
    cross: NDArray[Any], ours: NDArray[Any], theirs: NDArray[Any]
) -> tuple[tuple[Cluster, ...], tuple[tuple[str, int], ...]]:
    """Groups of units that answer alike, by average linkage, and how many of each kind."""
    import numpy as np
    from scipy.cluster.hierarchy import (  # type: ignore[import-untyped]
        fcluster,
        linkage,
    )
    from scipy.spatial.distance import squareform  # type: ignore[import-untyped]

    n, m = cross.shape
    if n + m > _UNITS:
        return (), ((f"not looked for among more than {_UNITS} units", 0),)
    every = np.block([[ours, cross], [cross.T, theirs]])
    apart = 1.0 - np.abs(every).clip(0.0, 1.0)
    np.fill_diagonal(apart, 0.0)
    tree = linkage(squareform((apart + apart.T) / 2, checks=False), "average")
    labels = fcluster(tree, 1.0 - TOGETHER, "distance")
    found: list[Cluster] = []
    kinds = dict.fromkeys(("one to one", "one to many", "many to many", "in one only", "alone"), 0)
    for label in np.unique(labels):
        units = np.flatnonzero(labels == label)
        first = tuple(int(u) for u in units if u < n)
        second = tuple(int(u - n) for u in units if u >= n)
        kinds[_kind(len(first), len(second))] += 1
        if len(units) > 1:
            found.append(Cluster(first, second))
    found.sort(key=lambda c: -len(c.first) - len(c.second))
    return tuple(found), tuple(kinds.items())


def _kind(first: int, second: int) -> str:
    if first + second == 1:
        return "alone"
    if not first or not second:
        return "in one only"
    if first == second == 1:
        return "one to one"
    return "one to many" if 1 in (first, second) else "many to many"
