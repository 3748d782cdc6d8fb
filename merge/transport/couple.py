"""Couplings found by the weights of two networks, whose widths may differ.

As in OTFusion (Singh and Jaggi 2020, arXiv:1910.05653) units are near whose incoming weights are,
after what comes in has been brought into the target's coordinates; here for whole spaces of a
symmetry. All writers and readers of a residual stream have a say in its one plan, so that what is
added up there is consistent by construction. For heads the outer costs are the least inner ones.

The first sweep goes from what is fixed (pixels, tokens, classes) to what meets coupled spaces;
later ones couple each space anew, the others given. One space is worked on at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from merge.alignment.families import Tree, families, members, names_of
from merge.alignment.held import Reader
from merge.errors import PlanError
from merge.symmetry.roles import counted
from merge.symmetry.symmetry import Layout, Symmetry
from merge.transport.coupling import Coupling, Couplings, Roles
from merge.transport.features import Metric, Term, stacked, terms_of
from merge.transport.plans import Marginals
from merge.transport.solve import Solver

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Coupled", "Manner", "check_sizes", "couple_weights", "still", "trees_of"]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Ends of names of tensors that are moved along, but say nothing about which units are alike."""

_REST = 1e-6
"""A sweep that gains less than this share of the cost is the last."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How units are coupled.

    regularisation: of the entropy, relative to the largest cost; 0 for exact plans. marginals: the
    weight of each unit, alike or by the norm of what comes in. metric: how far two units are apart.
    features: what units are compared by: what comes into them, or also what is taken from them.
    sweeps: over all spaces, at most.
    """

    regularisation: float = 0.0
    marginals: Marginals = "uniform"
    metric: Metric = "squared"
    features: Literal["both", "incoming"] = "both"
    sweeps: int = 4


@dataclass(frozen=True, slots=True, eq=False)
class Coupled:
    """What was found. scores: of each space 1 - cost / what a plan without any choice would cost;
    1 where all units have their equal. objective: the sum of costs after each sweep."""

    couplings: Couplings
    scores: Mapping[str, float]
    objective: tuple[float, ...] = ()
    converged: bool = True
    notes: tuple[str, ...] = field(default=())


def couple_weights(
    source: Symmetry,
    target: Symmetry,
    a: Reader,
    b: Reader,
    roles: Roles,
    manner: Manner | None = None,
    *,
    names: Sequence[str] | None = None,
    keep: Collection[str] = (),
) -> Coupled:
    """The couplings of every space of the network ``a`` with that of ``b``, the target.

    names: the tensors to go by. keep: groups that stay as they are. PlanError where a group that
    does not move has another size in the target, and where nothing can be compared.
    """
    manner = manner or Manner()
    trees = trees_of(source, target, keep)
    check_sizes(source, target, trees)
    chosen = [
        n
        for n in (source.tensors if names is None else names)
        if n in target.tensors and not n.endswith(STATISTICS) and source.tensors[n].groups()
    ]
    if not trees or not chosen:
        raise PlanError(
            "there is nothing to couple: no group of the symmetry may be moved",
            found=f"{len(target.groups)} groups in {len(chosen)} tensors",
            do="give the symmetry spec of this network, or keep fewer groups where they are",
        )
    search = _Search(source, target, a, b, roles, manner, chosen, trees)
    search.first()
    objective = [search.total]
    converged = False
    while len(objective) < manner.sweeps:
        search.again()
        objective.append(search.total)
        if objective[-2] - objective[-1] <= _REST * abs(objective[-2]):
            converged = True
            break
    return Coupled(search.known, search.scores, tuple(objective), converged, tuple(search.notes))


def trees_of(source: Symmetry, target: Symmetry, keep: Collection[str] = ()) -> tuple[Tree, ...]:
    """The groups that may be moved, in the target's sizes; also those that are one unit in one of
    the networks."""
    largest = {
        n: replace(g, size=max(g.size, source.groups[n].size if n in source.groups else 0))
        for n, g in target.groups.items()
    }

    def sized(tree: Tree) -> Tree:
        below = tuple(sized(t) for t in tree.below)
        return replace(tree, size=target.groups[tree.group].size, below=below)

    return tuple(sized(t) for t in families(replace(target, groups=largest), keep))


def check_sizes(source: Symmetry, target: Symmetry, trees: Sequence[Tree]) -> None:
    """PlanError where sizes differ that must not: of groups that stay, and of numbered modules."""
    moving = {t.group for t in members(*trees) if t.moves} - counted(target)
    for name, group in source.groups.items():
        other = target.groups.get(name)
        if other is not None and other.size != group.size and name not in moving:
            raise PlanError(
                "units that cannot be moved differ in number between the two models",
                group=name,
                found=group.size,
                expected=other.size,
                do=group.reason or "units that are chosen among, or whose order counts, must match",
            )


def still(source: Symmetry, tree: Tree) -> Coupling:
    """The coupling that leaves a tree's groups as they are."""
    import numpy as np

    from merge.transport.plans import of_index

    below = {(i, i): {t.group: still(source, t) for t in tree.below} for i in range(tree.size)}
    return Coupling(of_index(np.arange(tree.size)), below if tree.below else {})


@dataclass(slots=True, eq=False)
class _Search:
    """The state of a search: what is coupled so far, and at what cost."""

    source: Symmetry
    target: Symmetry
    a: Reader
    b: Reader
    roles: Roles
    manner: Manner
    names: Sequence[str]
    trees: Sequence[Tree]
    known: dict[str, Coupling] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """The cost of all spaces together."""
        return math.fsum(self.costs.values())

    def first(self) -> None:
        """Couple each space by what it shares with what is fixed or coupled, nearest first."""
        waiting = list(self.trees)
        while waiting:
            share = [self._share(t) for t in waiting]
            best = max(range(len(waiting)), key=lambda k: share[k])
            tree = waiting.pop(best)
            if share[best] > 0:
                self._couple(tree)
                continue
            if any(
                self.source.groups[g].size != self.target.groups[g].size for g in names_of(tree)
            ):
                raise PlanError(
                    "nothing tells which units of a group are alike",
                    group=tree.group,
                    expected="a tensor that it shares with a group that is coupled or fixed",
                    do="couple by activations",
                )
            self.known[tree.group] = still(self.source, tree)

    def again(self) -> None:
        """Couple each space anew, all others given."""
        for tree in self.trees:
            self._couple(tree)

    def _share(self, tree: Tree) -> float:
        """The share of a tree's tensors that can be compared now."""
        mine = names_of(tree)
        held = [n for n in self.names if mine & set(self.target.tensors[n].groups())]
        if not held:
            return 0.0
        covered = mine | {g for t in self.trees if t.group in self.known for g in names_of(t)}
        moving = names_of(*self.trees)
        fit = [n for n in held if set(self.target.tensors[n].groups()) & moving <= covered]
        return len(fit) / len(held)

    def _couple(self, tree: Tree) -> None:
        terms = list(self._terms(tree)) if tree.below else self._terms(tree)
        solver = Solver(self.source, self.target, self.manner, counted(self.target))
        found = solver.solve(tree, terms)
        self.known[tree.group] = found.coupling
        self.costs[tree.group] = found.cost
        self.scores[tree.group] = found.score

    def _terms(self, tree: Tree) -> Iterator[Term]:
        wanted, moving = names_of(tree), names_of(*self.trees)
        incoming = self.manner.features == "incoming"
        for name in self.names:
            layout = self.target.tensors[name]
            if not wanted & set(layout.groups()):
                continue
            for layouts, inside, values, known in self._values(name, layout, tree):
                for term in terms_of(layouts, inside, values, wanted, known, moving, self.roles):
                    if term.incoming or not incoming:
                        yield term

    def _values(
        self, name: str, layout: Layout, tree: Tree
    ) -> Iterator[tuple[tuple[Layout, Layout], frozenset[int], tuple[Tensor, Tensor], Couplings]]:
        """A tensor of both networks; of a stack that is coupled now, all of it at once."""
        import torch

        own, inside = self.source.tensors[name], self.roles.inputs[name]
        known: Couplings = self.known
        if layout.stack == tree.group:
            if layout.member:
                return
            both = (stacked(own, len(own.siblings)), stacked(layout, len(layout.siblings)))
            values = [
                torch.stack([_floats(r.read(n)) for n in side.siblings])
                for r, side in ((self.a, own), (self.b, layout))
            ]
            yield both, frozenset(k + 1 for k in inside), (values[0], values[1]), known
            return
        from_name = name
        if layout.stack in {t.group for t in self.trees}:
            stack = known.get(layout.stack)
            if stack is None:
                return
            j = stack.plan.source_of(layout.member)
            from_name = own.siblings[j]
            known = {**known, **stack.below.get((j, layout.member), {})}
        pair = (_floats(self.a.read(from_name)), _floats(self.b.read(name)))
        yield (own, layout), inside, pair, known


def _floats(tensor: Any) -> Tensor:
    import torch

    found: Tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return found
