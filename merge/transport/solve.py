"""The plan of one space by the blocks in which it stands, with those of the groups inside it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.alignment.families import Tree, names_of
from merge.symmetry.symmetry import Symmetry
from merge.transport.coupling import Coupling
from merge.transport.features import Term, cost_of, distance, norms_of
from merge.transport.plans import Plan, entropic, exact, importance, of_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from merge.transport.couple import Manner

__all__ = ["CostPart", "Solution", "Solver", "plan_of"]

_LEAST = 1e-4
"""A pair of heads with less than this share of the mass of one is left out of a soft plan."""


@dataclass(frozen=True, slots=True, eq=False)
class CostPart:
    """Distances of all pairs: axes of ``groups`` in the old network, then in the target."""

    groups: tuple[str, ...]
    cost: NDArray[Any]

    def at(self, group: str, j: int, i: int) -> CostPart:
        """The distances within index j of a group in the old network and i in the target."""
        import numpy as np

        k, count = self.groups.index(group), len(self.groups)
        rest = np.take(np.take(self.cost, i, count + k), j, k)
        return CostPart(self.groups[:k] + self.groups[k + 1 :], rest)

    def over(self, group: str, plan: Plan) -> CostPart:
        """The distances that are left where a group is coupled by a plan: their mean over it."""
        import numpy as np

        k, count = self.groups.index(group), len(self.groups)
        mean = np.tensordot(self.cost, plan.mass, axes=([k, count + k], [0, 1]))
        return CostPart(self.groups[:k] + self.groups[k + 1 :], np.asarray(mean))


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A coupling and what it costs: squared distance for each of the target's units, added up.

    score: 1 - cost / what a plan without any choice would cost.
    """

    coupling: Coupling
    cost: float
    score: float


def plan_of(
    cost: NDArray[Any],
    manner: Manner,
    a: NDArray[Any] | None = None,
    b: NDArray[Any] | None = None,
) -> Plan:
    """The plan of least cost, exact or entropic as is wanted."""
    largest = float(cost.max())
    if manner.regularisation > 0 and largest > 0:
        return entropic(cost, manner.regularisation * largest, a, b)
    return exact(cost, a, b)


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """Solves for the groups of a tree. chosen: groups that number modules, which are not mixed."""

    source: Symmetry
    target: Symmetry
    manner: Manner
    chosen: Collection[str] = field(default=())

    def solve(self, tree: Tree, terms: Iterable[Term]) -> Solution:
        """The best coupling of a tree by blocks with its groups."""
        if tree.below:
            return self._nested(tree, list(terms))
        sizes = self._sizes(tree.group)
        if self.manner.marginals != "uniform":
            terms = list(terms)
            marginals = self._marginals(tree.group, terms)
        else:
            marginals = (None, None)
        cost = cost_of(terms, tree.group, sizes, self.manner.metric)
        return self._planned(tree, cost, {}, marginals)

    def _planned(
        self,
        tree: Tree,
        cost: NDArray[Any],
        inner: Mapping[tuple[int, int], Mapping[str, Coupling]],
        marginals: tuple[NDArray[Any] | None, NDArray[Any] | None],
    ) -> Solution:
        import numpy as np

        if not tree.moves:
            plan = of_index(np.arange(tree.size))
        elif tree.group in self.chosen:
            plan = exact(cost)
        else:
            plan = plan_of(cost, self.manner, *marginals)
        if inner:
            plan = _without_traces(plan)
        mass = plan.mass
        below = {pair: found for pair, found in inner.items() if mass[pair] > 0}
        value = float((mass * cost).sum())
        usual = float(plan.a @ cost @ plan.b)
        score = 1.0 - value / usual if usual > 0 else 1.0
        return Solution(Coupling(plan, below), value * cost.shape[1], score)

    def _nested(self, tree: Tree, terms: Sequence[Term]) -> Solution:
        import numpy as np

        n, m = self._sizes(tree.group)
        cost = np.zeros((n, m))
        inner: dict[tuple[int, int], dict[str, Coupling]] = {}
        for j in range(n):
            for i in range(m) if tree.moves else [j]:
                pair = [t.at(tree.group, j, i) for t in terms if tree.group in t.groups]
                inner[j, i], cost[j, i] = self.together(tree.below, pair)
        found = self._planned(tree, cost, inner, (None, None))
        return found

    def together(
        self, trees: Sequence[Tree], terms: Sequence[Term]
    ) -> tuple[dict[str, Coupling], float]:
        """Couplings of groups that stand side by side, and what is left between the networks.

        Each is coupled by the blocks in which it stands alone, then once more with those that it
        shares with others, these moved by what was found.
        """
        found: dict[str, Coupling] = {}
        mine = {t.group: names_of(t) for t in trees}
        for tree in trees:
            alone = [t for t in terms if self._in(t, trees) == {tree.group}]
            found[tree.group] = self.solve(tree, alone).coupling
        shared = [t for t in terms if len(self._in(t, trees)) > 1]
        for tree in trees if shared else ():
            rest = {g: c for g, c in found.items() if g != tree.group}
            both = [t.after(rest) for t in shared if mine[tree.group] & set(t.groups)]
            alone = [t for t in terms if self._in(t, trees) == {tree.group}]
            found[tree.group] = self.solve(tree, [*alone, *both]).coupling
        return found, distance(t.after(found) for t in terms)

    def of_parts(self, tree: Tree, parts: Sequence[CostPart]) -> Solution:
        """The best coupling of a tree by distances of all pairs of units."""
        import numpy as np

        n, m = self._sizes(tree.group)
        cost = np.zeros((n, m))
        for part in parts:
            if part.groups == (tree.group,):
                cost += part.cost
        inner: dict[tuple[int, int], dict[str, Coupling]] = {}
        nested = [p for p in parts if len(p.groups) > 1 and tree.group in p.groups]
        for j in range(n) if tree.below else ():
            for i in range(m) if tree.moves else [j]:
                pair = [p.at(tree.group, j, i) for p in nested]
                inner[j, i], value = self._parts_together(tree.below, pair)
                cost[j, i] += value
        return self._planned(tree, cost, inner, (None, None))

    def _parts_together(
        self, trees: Sequence[Tree], parts: Sequence[CostPart]
    ) -> tuple[dict[str, Coupling], float]:
        found: dict[str, Coupling] = {}
        total = 0.0
        for tree in trees:
            mine = names_of(tree)
            own = [p for p in parts if set(p.groups) <= mine]
            for part in (p for p in parts if mine & set(p.groups) and not set(p.groups) <= mine):
                rest = part
                for group in part.groups:
                    if group not in mine and group in found:
                        rest = rest.over(group, found[group].plan)
                if set(rest.groups) <= mine:
                    own.append(rest)
            solved = self.of_parts(tree, own)
            found[tree.group] = solved.coupling
            total += solved.cost
        return found, total

    def _in(self, term: Term, trees: Sequence[Tree]) -> set[str]:
        """The trees whose groups stand in a block."""
        return {t.group for t in trees if names_of(t) & set(term.groups)}

    def _sizes(self, group: str) -> tuple[int, int]:
        return self.source.groups[group].size, self.target.groups[group].size

    def _marginals(
        self, group: str, terms: Sequence[Term]
    ) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
        if self.manner.marginals == "uniform":
            return None, None
        incoming = [t for t in terms if t.incoming] or terms
        norms = norms_of(incoming, group, self._sizes(group), self.manner.marginals)
        return importance(norms[0]), importance(norms[1])


def _without_traces(plan: Plan) -> Plan:
    """The plan without its least entries, the others raised so that the target's marginal holds."""
    import numpy as np

    mass = np.where(plan.mass > _LEAST * plan.b, plan.mass, 0.0)
    mass = mass * (plan.b / mass.sum(0))
    rows = mass.sum(1)
    return Plan(mass, np.where(rows > 0, rows, plan.a), plan.b)
