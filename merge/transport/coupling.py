"""Couplings: a plan for each group of units, and what it does to a tensor.

The coupling of a group on which others depend holds theirs too, one set for each pair of indices:
query and value dimensions are matched anew for every pair of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from merge.symmetry.axes import Axis, Factor
from merge.symmetry.roles import is_read
from merge.symmetry.symmetry import Layout
from merge.transport.plans import Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Coupling", "Couplings", "Roles", "permutation_of", "through", "transported"]


@dataclass(frozen=True, slots=True, eq=False)
class Coupling:
    """The plan of one group; below: for each pair (old, new) with mass, the groups inside."""

    plan: Plan
    below: Mapping[tuple[int, int], Mapping[str, Coupling]] = field(default_factory=dict)


Couplings: TypeAlias = Mapping[str, Coupling]


@dataclass(frozen=True, slots=True)
class Roles:
    """What tells readers from writers: axes that are read, and groups whose stars are writers."""

    inputs: Mapping[str, frozenset[int]]
    flipped: frozenset[str] = frozenset()


def transported(
    name: str, values: Tensor, layout: Layout, couplings: Couplings, roles: Roles
) -> Tensor:
    """One tensor after the couplings: ``W' = R_out W R_in'`` for a map, ``b' = R_out b`` for a
    bias. layout: the old one. Groups without a coupling stay as they are.

    Where the layout is a slice of a stack, ``values`` are those of the slice that comes here.
    """
    inside = roles.inputs[name]
    dims: Dims = [(axis, k in inside) for k, axis in enumerate(layout.axes)]
    return _moved(values, dims, couplings, roles.flipped)


Dims = list[tuple[Axis | Factor, bool]]


def _moved(x: Tensor, dims: Dims, couplings: Couplings, flipped: frozenset[str]) -> Tensor:
    """Sums taken apart, part by part."""
    import math

    import torch

    for k, (axis, inside) in enumerate(dims):
        if not isinstance(axis, Axis):
            continue
        pieces, at = [], 0
        for product in axis.parts:
            sizes = [f.size for f in product]
            piece = x.narrow(k, at, math.prod(sizes))
            piece = piece.reshape(*x.shape[:k], *sizes, *x.shape[k + 1 :])
            inner: Dims = [*dims[:k], *((f, inside) for f in product), *dims[k + 1 :]]
            found = _moved(piece, inner, couplings, flipped)
            end = k + len(product)
            length = math.prod(found.shape[k:end])
            pieces.append(found.reshape(*found.shape[:k], length, *found.shape[end:]))
            at += math.prod(sizes)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, k)
    factors = [f for f, _ in dims if isinstance(f, Factor)]
    reads = [is_read(f, inside, flipped) for f, (_, inside) in zip(factors, dims, strict=True)]
    return through(x, [f.group for f in factors], reads, couplings)


def through(
    x: Tensor, groups: Sequence[str | None], reads: Sequence[bool], couplings: Couplings
) -> Tensor:
    """A block with an axis for each of ``groups``, after the couplings of some of them.

    reads: of each axis, whether it is read. Axes keep their places.
    """
    for name in dict.fromkeys(g for g in groups if g in couplings):
        coupling = couplings[str(name)]
        inner = {g for found in coupling.below.values() for g in found}
        places = [k for k, g in enumerate(groups) if g == name]
        if inner & set(groups):
            x = _pairwise(x, groups, reads, coupling, places[0])
            continue
        for k in places:
            x = _mapped(x, k, coupling.plan, reads[k])
    return x


def _mapped(x: Tensor, k: int, plan: Plan, read: bool) -> Tensor:
    """Axis k after one of a plan's maps: a few rows added up, or a product of matrices."""
    import torch

    if plan.entries is None:
        turned = torch.as_tensor((plan.into if read else plan.out).T).to(x)
        found: Tensor = torch.tensordot(x, turned, dims=([k], [0])).movedim(-1, k)
        return found
    rows, columns, values = plan.entries
    shares = values / (plan.a[rows] if read else plan.b[columns])
    picked = x.index_select(k, torch.as_tensor(rows, device=x.device))
    shape = [-1 if n == k else 1 for n in range(x.ndim)]
    picked *= torch.as_tensor(shares).to(x).view(shape)
    out = x.new_zeros([len(plan.b) if n == k else size for n, size in enumerate(x.shape)])
    return out.index_add_(k, torch.as_tensor(columns, device=x.device), picked)


def _pairwise(
    x: Tensor, groups: Sequence[str | None], reads: Sequence[bool], coupling: Coupling, k: int
) -> Tensor:
    """Axis k with the axes of what depends on it: a sum over pairs, each with its own maps."""
    import torch

    weights = coupling.plan.into if reads[k] else coupling.plan.out
    rest = [*groups[:k], *groups[k + 1 :]], [*reads[:k], *reads[k + 1 :]]
    rows: list[Tensor | None] = [None] * weights.shape[0]
    for (j, i), inner in coupling.below.items():
        piece = through(x.select(k, j), *rest, inner) * float(weights[i, j])
        known = rows[i]
        rows[i] = piece if known is None else known + piece
    return torch.stack([r for r in rows if r is not None], k)


def permutation_of(coupling: Coupling) -> tuple[NDArray[np.int64], dict[str, object]] | None:
    """The permutation that a coupling is, and those of what depends on it, as moves of an
    element; None unless all are."""
    import numpy as np

    index = coupling.plan.index
    if index is None:
        return None
    out: dict[str, object] = {}
    old = {int(j): i for i, j in enumerate(index)}
    found: dict[str, list[object]] = {}
    for j in range(len(index)):
        for name, inner in coupling.below.get((j, old[j]), {}).items():
            moves = permutation_of(inner)
            if moves is None:
                return None
            for key, value in {name: moves[0], **moves[1]}.items():
                found.setdefault(key, []).append(value)
    for key, values in found.items():
        if len(values) == len(index):
            out[key] = np.stack(values)  # type: ignore[arg-type]
    return index, out
