"""What units are compared by: the blocks of tensors in which they stand, in both networks.

Everything else in a block is brought into the target's coordinates first, so that what remains of
two units are two vectors. Squared distances between all pairs come from products of matrices
(``|x|^2 + |y|^2 - 2 x y'``); no array of pairs times features is ever made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from merge.alignment.costs import views
from merge.symmetry.axes import Axis, Factor
from merge.symmetry.roles import is_read
from merge.symmetry.symmetry import Layout, blocks
from merge.transport.coupling import Couplings, Roles, through

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["METRICS", "Metric", "Term", "cost_of", "distance", "norms_of", "stacked", "terms_of"]

_BLOCK = 1 << 22
"""Elements of a product that are computed in one go, before they are added up in float64."""

Metric = Literal["squared", "euclidean", "cosine"]
METRICS = ("squared", "euclidean", "cosine")
"""How far apart two units are: squared or plain distance of their vectors, 1 - cosine."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A block in both networks, alike but for the axes of ``groups``; None for any other axis.

    reads: of each axis whether its units are read. incoming: whether the block is what comes into
    the units, not what others take from them.
    """

    a: Tensor
    b: Tensor
    groups: tuple[str | None, ...]
    reads: tuple[bool, ...]
    incoming: bool = True

    def at(self, group: str, j: int, i: int) -> Term:
        """The block at index j of a group in the old network, and i in the target."""
        k = self.groups.index(group)
        groups, reads = (x[:k] + x[k + 1 :] for x in (self.groups, self.reads))
        return Term(self.a.select(k, j), self.b.select(k, i), groups, reads, self.incoming)  # type: ignore[arg-type]

    def after(self, couplings: Couplings) -> Term:
        """The block with the old network's units of some groups brought to the target's."""
        a = through(self.a, self.groups, self.reads, couplings)
        groups = tuple(None if g in couplings else g for g in self.groups)
        return replace(self, a=a, groups=groups)


def terms_of(
    layouts: tuple[Layout, Layout],
    inside: frozenset[int],
    values: tuple[Tensor, Tensor],
    wanted: Collection[str],
    known: Couplings,
    moving: Collection[str],
    roles: Roles,
) -> Iterator[Term]:
    """The blocks of one tensor in which ``wanted`` groups stand, of those that can be compared.

    layouts, values: old and target. inside: the axes that are read. known: couplings so far; a
    block with a group of ``moving`` that has none yet is left out. A wanted group that stands twice
    comes once for each place, the other one moved by what is known.
    """
    source, target = layouts
    pairs = zip(views(values[0], source.axes), views(values[1], target.axes), strict=True)
    covered = _names(known)
    for ((x, factors), (y, _)), flags in zip(pairs, _flags(source.axes, inside), strict=True):
        names = [f.group for f in factors]
        places = [k for k, n in enumerate(names) if n in wanted]
        if not places or any(
            n in moving and n not in covered and n not in wanted for n in names if n
        ):
            continue
        reads = [is_read(f, i, roles.flipped) for f, i in zip(factors, flags, strict=True)]
        others = {g: c for g, c in known.items() if g not in wanted}
        x = _scaled(through(x, names, reads, others), y, places, reads)
        incoming = not any(flags[k] for k in places)
        doubled = [k for k in places if names.count(names[k]) > 1]
        if not doubled:
            groups = tuple(n if n in wanted else None for n in names)
            yield Term(x, y, groups, tuple(reads), incoming)
            continue
        for k in doubled:
            rest = [n if place in places and place != k else None for place, n in enumerate(names)]
            if any(n not in known for n in rest if n):
                continue
            moved = through(x, rest, reads, known)
            groups = tuple(n if place == k else None for place, n in enumerate(names))
            yield Term(moved, y, groups, tuple(reads), not flags[k])


def _scaled(x: Tensor, y: Tensor, places: list[int], reads: list[bool]) -> Tensor:
    """What is read from units that are fewer or more, as if they were as many."""
    ratio = math.prod(x.shape[k] / y.shape[k] for k in places if reads[k])
    return x if ratio == 1.0 else x * ratio


def _flags(axes: tuple[Axis, ...], inside: frozenset[int]) -> Iterator[tuple[bool, ...]]:
    """Of each block's factors whether they stand on an axis that is read."""
    chains = [[len(chain) for chain in blocks((axis,))] for axis in axes]
    for lengths in itertools.product(*chains):
        yield tuple(k in inside for k, length in enumerate(lengths) for _ in range(length))


def _names(couplings: Couplings) -> set[str]:
    """All groups that couplings hold."""
    found = set(couplings)
    for coupling in couplings.values():
        for inner in coupling.below.values():
            found |= _names(inner)
            break
    return found


def stacked(layout: Layout, size: int) -> Layout:
    """The layout of a stack's slices put together, the stack's group first."""
    first = Axis(((Factor(layout.stack, size),),))
    return Layout((size, *layout.shape), (first, *layout.axes))


def distance(terms: Iterable[Term]) -> float:
    """The squared distance of blocks in which no group is left."""
    return sum(float((t.a - t.b).double().square().sum()) for t in terms)


def cost_of(
    terms: Iterable[Term], group: str, sizes: tuple[int, int], metric: Metric = "squared"
) -> NDArray[np.float64]:
    """How far apart each old unit and each of the target's are, (n, m)."""
    import numpy as np
    import torch

    ours, theirs = (torch.zeros(s, dtype=torch.float64) for s in sizes)
    products = torch.zeros(sizes, dtype=torch.float64)
    for term in terms:
        x, y = _unfolded(term, group)
        ours += x.double().square().sum(1)
        theirs += y.double().square().sum(1)
        step = max(1, _BLOCK // sizes[1])
        for at in range(0, sizes[0], step):
            products[at : at + step] += x[at : at + step] @ y.T
    if metric == "cosine":
        scale = (ours.sqrt()[:, None] * theirs.sqrt()).clamp_min_(1e-300)
        return np.asarray((1.0 - products / scale).clamp_min_(0.0).numpy())
    # of equal units rounding leaves less than this, which is no distance
    least = 1e-7 * float(ours.mean() + theirs.mean())
    squares = products.mul_(-2.0).add_(ours[:, None]).add_(theirs).sub_(least).clamp_min_(0.0)
    return np.asarray((squares if metric == "squared" else squares.sqrt_()).numpy())


def norms_of(
    terms: Iterable[Term], group: str, sizes: tuple[int, int], kind: Literal["l1", "l2"]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """L1 or L2 norm of what describes each unit, in both networks."""
    import torch

    totals = [torch.zeros(s, dtype=torch.float64) for s in sizes]
    for term in terms:
        for total, x in zip(totals, _unfolded(term, group), strict=True):
            total += (x.abs() if kind == "l1" else x.double().square()).double().sum(1)
    found = [t if kind == "l1" else t.sqrt() for t in totals]
    return found[0].numpy(), found[1].numpy()


def _unfolded(term: Term, group: str) -> tuple[Tensor, Tensor]:
    k = term.groups.index(group)
    x, y = (t.movedim(k, 0).reshape(t.shape[k], -1) for t in (term.a, term.b))
    return x, y
