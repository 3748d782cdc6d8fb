"""Transport plans between two sets of units, and the two maps that a plan makes of them.

A plan T (n, m) says how much of each of n units goes to each of m others; its rows sum to the
marginal a of the first, its columns to b of the second. What is written to the new units and what
is read from them are moved by two different maps::

    out  = diag(1/b) T'        (m, n), rows sum to 1: a new unit is a mean of old ones
    into = (diag(1/a) T)'      (m, n), columns sum to 1: what an old unit gave is shared out

For a permutation both are that permutation. Networks whose units are copied, or whose copies are
joined, stay the same function with this pair, with neither map alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from merge.alignment.solvers import assign
from merge.errors import PlanError, RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MARGINALS", "Marginals", "Plan", "entropic", "exact", "importance", "of_index"]

Entries: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]"
Marginals = Literal["uniform", "l1", "l2"]
MARGINALS = ("uniform", "l1", "l2")
"""How much each unit weighs: alike, or by the norm of what describes it."""

_FLOOR = 1e-3
"""The least weight of a unit relative to the mean: one without any would have no image."""

_ITERATIONS = 10_000_000
"""Steps of the network simplex at most."""


class Plan:
    """How much of each of n units goes to each of m; a and b are what rows and columns sum to.

    Exact plans have at most n + m - 1 entries, and only these are kept.
    """

    __slots__ = ("_dense", "_entries", "_shape", "a", "b")

    def __init__(
        self, mass: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
    ) -> None:
        import numpy as np

        self.a, self.b, self._shape = a, b, mass.shape
        self._dense: NDArray[np.float64] | None = None
        self._entries: Entries | None = None
        if np.count_nonzero(mass) < len(a) + len(b):
            rows, columns = np.nonzero(mass)
            self._entries = (rows, columns, mass[rows, columns])
        else:
            self._dense = mass

    @property
    def mass(self) -> NDArray[np.float64]:
        """The plan as a matrix, (n, m)."""
        import numpy as np

        if self._dense is not None:
            return self._dense
        full = np.zeros(self._shape)
        if self._entries is not None:
            rows, columns, values = self._entries
            full[rows, columns] = values
        return full

    @property
    def entries(self) -> Entries | None:
        """Old units, new units, and how much goes from one to the other; None for soft plans."""
        return self._entries

    @property
    def out(self) -> NDArray[np.float64]:
        """The map of what is written, (m, n); rows sum to 1."""
        found: NDArray[np.float64] = (self.mass / self.b).T
        return found

    @property
    def into(self) -> NDArray[np.float64]:
        """The map of what is read, (m, n); columns sum to 1."""
        found: NDArray[np.float64] = (self.mass / self.a[:, None]).T
        return found

    @property
    def index(self) -> NDArray[np.int64] | None:
        """The permutation that the plan is: unit i is old unit ``index[i]``; None for another."""
        import numpy as np

        if self._entries is None or self._shape[0] != self._shape[1]:
            return None
        rows, columns, _ = self._entries
        every = np.arange(self._shape[0])
        if not (np.array_equal(np.sort(rows), every) and np.array_equal(np.sort(columns), every)):
            return None
        index = np.empty_like(every)
        index[columns] = rows
        return index

    def source_of(self, i: int) -> int:
        """The old unit that gives most to the new unit i."""
        if self._entries is None:
            return int(self.mass[:, i].argmax())
        rows, columns, values = self._entries
        here = columns == i
        return int(rows[here][values[here].argmax()])


def of_index(index: NDArray[np.int64], count: int | None = None) -> Plan:
    """The plan by which new unit i is old unit ``index[i]``, of ``count`` old ones.

    An old unit that several new ones take is shared out among them; one that none takes is lost.
    """
    import numpy as np

    index = np.asarray(index, np.int64)
    n, m = count or len(index), len(index)
    mass = np.zeros((n, m))
    mass[index, np.arange(m)] = 1.0 / m
    a = mass.sum(1)
    return Plan(mass, np.where(a > 0, a, 1.0 / m), np.full(m, 1.0 / m))


def importance(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights that sum to 1, in proportion to ``norms``; none is less than 1/1000 of the mean."""
    import numpy as np

    mean = float(norms.mean())
    if not mean > 0:
        return np.full(len(norms), 1.0 / len(norms))
    floored = np.maximum(norms, _FLOOR * mean)
    found: NDArray[np.float64] = floored / floored.sum()
    return found


def exact(
    cost: NDArray[np.float64],
    a: NDArray[np.float64] | None = None,
    b: NDArray[np.float64] | None = None,
) -> Plan:
    """The plan of least ``sum T * cost`` with marginals a and b, by default uniform.

    Among uniform plans where one width is a multiple of the other there is one that is an
    assignment of copies; scipy finds it. All others need the network simplex of POT (the extra
    ``ot``): PlanError where it is not installed.
    """
    import numpy as np

    _check(cost, a, b)
    n, m = cost.shape
    uniform = all(x is None or np.allclose(x, 1.0 / len(x), rtol=1e-9, atol=0) for x in (a, b))
    if uniform and (n % m == 0 or m % n == 0):
        return _assigned(cost)
    weights = [np.full(k, 1.0 / k) if x is None else x for k, x in ((n, a), (m, b))]
    return _simplex(cost, *weights)


def _assigned(cost: NDArray[np.float64]) -> Plan:
    """Uniform marginals, one width a multiple of the other."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    n, m = cost.shape
    if n == m:  # where nothing is better units stay where they are
        return of_index(assign(-cost.T, np.arange(n)).index)
    copies = np.repeat(np.repeat(cost, max(1, m // n), 0), max(1, n // m), 1)
    rows, columns = linear_sum_assignment(copies)
    mass = np.zeros((n, m))
    share = 1.0 / len(copies)
    np.add.at(mass, (rows // max(1, m // n), columns // max(1, n // m)), share)
    return Plan(mass, np.full(n, 1.0 / n), np.full(m, 1.0 / m))


def _simplex(cost: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> Plan:
    import numpy as np

    try:
        import ot  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise PlanError(
            "transport between these widths needs POT, which is not installed",
            found=f"{len(a)} units to {len(b)}",
            expected="the package POT, uniform widths of which one is a multiple of the other, or"
            " a regularisation above 0",
            do="pip install 'hf-merge[ot]'",
        ) from None
    mass, log = ot.emd(a, b, np.ascontiguousarray(cost), numItermax=_ITERATIONS, log=True)
    if log["warning"]:
        raise PlanError(
            "the network simplex found no optimal plan",
            found=log["warning"],
            do="give a regularisation above 0",
        )
    return Plan(np.asarray(mass), a, b)


def entropic(
    cost: NDArray[np.float64],
    regularisation: float,
    a: NDArray[np.float64] | None = None,
    b: NDArray[np.float64] | None = None,
    *,
    rounds: int = 2000,
    tolerance: float = 1e-9,
) -> Plan:
    """The plan of least ``sum T * cost + regularisation * sum T log T`` (Cuturi 2013).

    regularisation: above 0, in units of the cost. Sinkhorn's updates in the log domain, started
    from larger regularisations, so that nothing overflows and small ones end too; the last step
    brings the marginals to a and b exactly (Altschuler et al. 2017, algorithm 2).
    """
    import numpy as np
    import torch

    _check(cost, a, b)
    if not regularisation > 0:
        raise RecipeError(
            "the regularisation of a transport plan is positive",
            key="regularisation",
            found=regularisation,
            expected="a number above 0",
        )
    weights = [np.full(k, 1.0 / k) if x is None else x for k, x in zip(cost.shape, (a, b))]  # noqa: B905
    costs = torch.from_numpy(np.ascontiguousarray(cost))
    left, right = (torch.from_numpy(np.log(w)) for w in weights)
    f, g = torch.zeros_like(left), torch.zeros_like(right)
    epsilon = max(regularisation, float(costs.abs().max()))
    while True:
        last = epsilon <= regularisation
        for step in range(rounds if last else 20):
            f = epsilon * (left - ((g - costs) / epsilon).logsumexp(1))
            new = epsilon * (right - ((f[:, None] - costs) / epsilon).logsumexp(0))
            # f fits the rows to the old g: how far g moves is how far the rows are off
            moved, g = float((new - g).abs().max()), new
            if step and moved < tolerance * epsilon:
                break
        if last:
            break
        epsilon = max(regularisation, epsilon / 4)
    mass = ((f[:, None] + g - costs) / epsilon).exp().numpy()
    return Plan(_rounded(mass, *weights), *weights)


def _rounded(
    mass: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The plan with the exact marginals: too full rows and columns cut, the rest spread."""
    import numpy as np

    mass = mass * np.minimum(1.0, a / np.maximum(mass.sum(1), 1e-300))[:, None]
    mass = mass * np.minimum(1.0, b / np.maximum(mass.sum(0), 1e-300))
    rows, columns = a - mass.sum(1), b - mass.sum(0)
    total = float(np.abs(rows).sum())
    return mass + np.outer(rows, columns) / total if total > 1e-300 else mass


def _check(
    cost: NDArray[np.float64], a: NDArray[np.float64] | None, b: NDArray[np.float64] | None
) -> None:
    import numpy as np

    if cost.ndim != 2 or not cost.size or not np.isfinite(cost).all():
        raise PlanError(
            "units have costs that are no finite numbers",
            found=f"an array of {list(cost.shape)}",
            expected="a matrix of finite numbers",
            do="look for NaN or infinity in the models or the data",
        )
    for k, x in enumerate((a, b)):
        if x is not None and (len(x) != cost.shape[k] or (x <= 0).any() or abs(x.sum() - 1) > 1e-6):
            raise PlanError(
                "the weights of units are no marginal of a plan",
                found=f"{len(x)} weights that sum to {float(x.sum()):g}",
                expected=f"{cost.shape[k]} positive weights that sum to 1",
            )
