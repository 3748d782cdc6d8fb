"""Straight-through matching: the permutation whose mid-point with the first network loses least.

Ainsworth et al. 2023, section 3.3: free weights u start as A's. In each step pi is the weight match
of B to u; the loss of the mid-point ``(A + pi(B)) / 2`` is differentiated as if pi(B) were u, and u
moves against it, so that it draws pi to where the mid-point is good. Here every candidate is judged
by its loss on data that is kept aside, not by that of the passing batch, and the search begins with
the match of the weights themselves, so what comes out is never worse than that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge.alignment.report import Match, Report, moved_share
from merge.alignment.weight import match_weights
from merge.errors import PlanError
from merge.symmetry.action import apply
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from torch import Tensor

    Loss = Callable[[Mapping[str, Tensor], Any], Tensor]
    """From a network's tensors and a batch to the mean loss."""

__all__ = ["InMemory", "match_straight_through"]


class InMemory:
    """A reader over tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """The tensor, or some rows of it."""
        found = self._tensors[name].detach()
        return found if last is None else found[first:last]


def match_straight_through(
    symmetry: Symmetry,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    batches: Iterable[Any],
    loss: Loss,
    *,
    aside: Sequence[Any] = (),
    steps: int = 200,
    every: int = 1,
    learning_rate: float = 1e-3,
    keep: Collection[str] = (),
) -> Match:
    """The element that brings B to A such that their mid-point has the least loss found.

    batches: passed over again until there have been ``steps`` of Adam. loss: of a network's tensors
    on a batch, as by `torch.func.functional_call`. aside: batches by which candidates are judged;
    by default the last of ``batches``, which is then not learned from. every: steps from one match
    to the next. PlanError where there is no data.
    """
    import torch

    data = list(batches)
    judges = list(aside) or data[-1:]
    if not data:
        raise PlanError(
            "there is no data to match on a loss",
            found="no batches",
            expected="two batches or more: one is kept aside to judge by",
            do="give data, or match by weights, which needs none",
        )
    notes = []
    if not aside and len(data) == 1:
        notes.append("one batch serves to learn from and to judge by")
    elif not aside:
        data.pop()
    floats = [n for n, t in a.items() if t.is_floating_point()]

    def middle(other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: (a[n] + other[n]) / 2 if n in floats else a[n] for n in a}

    def judged(other: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            return sum(float(loss(middle(other), batch)) for batch in judges) / len(judges)

    match = match_weights(symmetry, InMemory(a), InMemory(b), keep=keep)
    aligned = apply(symmetry, b, match.element)
    best, element = judged(aligned), match.element
    trace, now = [best], match.element
    free = {n: a[n].detach().clone().requires_grad_() for n in floats}
    adam = torch.optim.Adam(list(free.values()), learning_rate)
    for step in range(steps):
        if step and step % every == 0:
            now = match_weights(
                symmetry, InMemory({**a, **free}), InMemory(b), keep=keep, start=now
            ).element
            aligned = apply(symmetry, b, now)
            value = judged(aligned)
            if value < best:
                best, element = value, now
            trace.append(best)
        through = {n: aligned[n] + free[n] - free[n].detach() for n in floats}
        adam.zero_grad()
        loss(middle({**aligned, **through}), data[step % len(data)]).backward()  # type: ignore[no-untyped-call]
        adam.step()
    return Match(element, _report(symmetry, match, element, trace, judged(b), notes))


def _report(
    symmetry: Symmetry,
    start: Match,
    element: Mapping[str, Any],
    trace: Sequence[float],
    naive: float,
    notes: Sequence[str],
) -> Report:
    moved, shares = moved_share(symmetry, element)
    groups = tuple(replace(g, moved=shares[g.group], score=None) for g in start.report.groups)
    told = f"loss of the mid-point: {naive:.4f} as they are, {trace[0]:.4f} by weights,"
    return Report(
        method="straight-through matching",
        objective=tuple(-x for x in trace),
        converged=True,
        before=None,
        after=None,
        moved=moved,
        groups=groups,
        notes=(f"{told} {trace[-1]:.4f} found", *notes),
    )
