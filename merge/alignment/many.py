"""Several networks in one frame, so that going round from one to the next changes nothing.

C2M3 (Crisostomi et al. 2024, arXiv:2405.17897): each network i has an element to a common frame,
and the map from i to k goes through it, so the maps around any circle make the identity. What is
maximised is the sum over all pairs of the inner products of the networks in that frame.

Two ways up, joined: *synchronising* matches each network in turn to the mean of all others, exact
in each step (the "merge many" of Git Re-Basin); `merge.alignment.frank_wolfe` moves all at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.alignment.families import families
from merge.alignment.frank_wolfe import frank_wolfe, pairs
from merge.alignment.matching import identity
from merge.alignment.report import Report, moved_share
from merge.alignment.ste import InMemory
from merge.alignment.weight import STATISTICS, match_weights
from merge.errors import PlanError
from merge.symmetry.action import apply
from merge.symmetry.elements import compose, inverse
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Mapping[str, Tensor]

__all__ = ["Many", "match_many"]


@dataclass(frozen=True, slots=True, eq=False)
class Many:
    """An element for each network, which brings it to the frame of the first, whose own is none."""

    elements: tuple[Mapping[str, Any], ...]
    report: Report


def match_many(
    symmetry: Symmetry,
    networks: Sequence[Tensors],
    *,
    keep: Collection[str] = (),
    steps: int = 50,
    rounds: int = 20,
) -> Many:
    """The elements that bring several networks, all in memory, to the frame of the first.

    steps: of Frank and Wolfe, at most. rounds: of synchronising, at most. PlanError for fewer than
    two networks.
    """
    if len(networks) < 2:
        raise PlanError("one network has nothing to be aligned with", found=len(networks))
    names = [
        n
        for n, layout in symmetry.tensors.items()
        if layout.groups() and not n.endswith(STATISTICS)
    ]
    plain = [{n: t[n].float() for n in names} for t in networks]
    trees = families(symmetry, keep)
    still: list[Mapping[str, Any]] = [identity(*trees) for _ in networks]
    search = _Search(symmetry, plain, names, keep, rounds, still)
    search.begin()
    other = frank_wolfe(symmetry, plain, search.elements, trees, steps)
    if search.improves(other):
        search.synchronise()
    elements = search.elements
    back = inverse(symmetry, elements[0])
    framed = tuple(compose(symmetry, e, back) for e in elements)
    return Many(framed, _report(symmetry, framed, plain, search.trace))


@dataclass(slots=True)
class _Search:
    """The best elements so far; ``trace``: what they were worth, never falling."""

    symmetry: Symmetry
    networks: Sequence[Tensors]
    names: Sequence[str]
    keep: Collection[str]
    rounds: int
    elements: list[Mapping[str, Any]]
    trace: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Match each network to the mean of those before it, then in turns to all others."""
        self.trace.append(_together(self.symmetry, self.networks, self.elements))
        found = list(self.elements)
        for i in range(1, len(found)):
            found[i] = self._matched(i, found, range(i), start=None)
        self.improves(found)
        self.synchronise()

    def improves(self, elements: Sequence[Mapping[str, Any]]) -> bool:
        """Take elements that are worth more than those there are."""
        value = _together(self.symmetry, self.networks, elements)
        better = value > self.trace[-1] + 1e-9 * abs(self.trace[-1])
        if better:
            self.elements = list(elements)
            self.trace.append(value)
        return better

    def synchronise(self) -> None:
        """Match each network in turn to the mean of all others, until none gains."""
        for _ in range(self.rounds):
            found = list(self.elements)
            for i in range(len(found)):
                others = [k for k in range(len(found)) if k != i]
                found[i] = self._matched(i, found, others, start=found[i])
            if not self.improves(found):
                return

    def _matched(
        self,
        i: int,
        elements: Sequence[Mapping[str, Any]],
        others: Iterable[int],
        start: Mapping[str, Any] | None,
    ) -> Mapping[str, Any]:
        moved = [apply(self.symmetry, self.networks[k], elements[k]) for k in others]
        mean = {n: sum((m[n] for m in moved[1:]), moved[0][n]) / len(moved) for n in self.names}
        return match_weights(
            self.symmetry,
            InMemory(mean),
            InMemory(self.networks[i]),
            names=self.names,
            keep=self.keep,
            start=start,
        ).element


def _together(
    symmetry: Symmetry, networks: Sequence[Tensors], elements: Sequence[Mapping[str, Any]]
) -> float:
    """Sum over all pairs of networks of their inner product in the common frame."""
    return pairs([apply(symmetry, t, e) for t, e in zip(networks, elements, strict=True)])


def _report(
    symmetry: Symmetry,
    elements: Sequence[Mapping[str, Any]],
    networks: Sequence[Tensors],
    trace: Sequence[float],
) -> Report:
    moved = [moved_share(symmetry, e)[0] for e in elements[1:]]
    sizes = [math.sqrt(sum(float((t.double() ** 2).sum()) for t in n.values())) for n in networks]
    most = sum(x * y for x, y in itertools.combinations(sizes, 2))
    return Report(
        method=f"cycle-consistent matching of {len(networks)}",
        objective=tuple(trace),
        converged=True,
        before=trace[0] / most,
        after=trace[-1] / most,
        moved=sum(moved) / len(moved),
        groups=(),
    )
