"""Several networks side by side made one, by which of their units become the same.

Side by side the networks are one network of all their units, whose weights are block diagonal. A
membership says which new unit each of these becomes, and is a transport plan from all units to the
new ones, with both of its maps: a new unit is written by the mean of its members, and each member's
readers take from it what they took from the member::

    W' = sum_k out_k W_k into_k'      b' = sum_k out_k b_k

With pairs of which some stay apart this is partial matching (PLeaS; Nasery et al. 2024,
arXiv:2407.02447): blocks for what is common, for the first's own and for the second's own; what
leads from one's own to the other's is zero. With clusters within and across networks it is zipping
(ZipIt!; Stoica et al. 2023, arXiv:2305.03053). What a network returns is common to all: their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from merge.symmetry.axes import Axis, Factor, factors_of
from merge.symmetry.roles import is_read
from merge.symmetry.symmetry import Layout
from merge.transport.coupling import Coupling, Couplings, Roles, transported
from merge.transport.plans import Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Membership", "axis_maps", "couplings_of", "joined", "kinds_of", "parted"]


@dataclass(frozen=True, slots=True, eq=False)
class Membership:
    """Which of ``count`` new units each unit becomes: ``index[k, i]`` for unit i of network k."""

    index: NDArray[np.int64]
    count: int

    def plans(self) -> list[Plan]:
        """The plan from all networks' units to the new ones, in a part for each network."""
        import numpy as np

        models, size = self.index.shape
        total = models * size
        b = np.bincount(self.index.reshape(-1), minlength=self.count) / total
        found = []
        for row in self.index:
            mass = np.zeros((size, self.count))
            mass[np.arange(size), row] = 1.0 / total
            found.append(Plan(mass, np.full(size, 1.0 / total), b))
        return found


def parted(size: int, apart: NDArray[np.int64]) -> Membership:
    """Pairs of two networks, of which those in ``apart`` stay two units: first those that are
    common, in order, then the first network's own, then the second's."""
    import numpy as np

    own = np.zeros(size, bool)
    own[apart] = True
    common, count = int((~own).sum()), int(own.sum())
    index = np.empty((2, size), np.int64)
    index[:, ~own] = np.arange(common)
    index[0, own] = common + np.arange(count)
    index[1, own] = common + count + np.arange(count)
    return Membership(index, common + 2 * count)


def couplings_of(members: Mapping[str, Membership], models: int) -> list[dict[str, Coupling]]:
    """For each network the couplings of the groups in ``members``."""
    found: list[dict[str, Coupling]] = [{} for _ in range(models)]
    for group, membership in members.items():
        for own, plan in zip(found, membership.plans(), strict=True):
            own[group] = Coupling(plan)
    return found


def joined(
    name: str,
    values: Sequence[Tensor],
    layout: Layout,
    couplings: Sequence[Couplings],
    roles: Roles,
) -> Tensor:
    """One tensor of the new network. values: that tensor of each; layout: of one of them.

    Groups without a coupling are common to all. A tensor that writes none of the coupled groups is
    a mean over the networks, in what it reads a mean of what each of them took.
    """
    total: Tensor | None = None
    for value, own in zip(values, couplings, strict=True):
        part = transported(name, value, layout, own, roles)
        total = part if total is None else total + part
    assert total is not None
    inside = roles.inputs[name]
    written = any(
        f.group in couplings[0] and not is_read(f, k in inside, roles.flipped)
        for k, axis in enumerate(layout.axes)
        for f in factors_of(axis)
    )
    return total if written else total / len(values)


def axis_maps(axis: Axis, couplings: Sequence[Couplings]) -> list[Tensor]:
    """For each network the map of what is written along an axis, (new, old), in float64.

    Their rows sum to 1 over all networks together.
    """
    import torch

    plain = axis.map(lambda f: replace(f, form=""))
    layout = Layout((axis.size, axis.size), (plain, Axis(((Factor(None, axis.size),),))))
    roles = Roles({"map": frozenset()})
    coupled = any(f.group in couplings[0] for f in factors_of(axis))
    eye = torch.eye(axis.size, dtype=torch.float64)
    share = 1.0 if coupled else 1.0 / len(couplings)
    return [transported("map", eye, layout, own, roles) * share for own in couplings]


def kinds_of(maps: Sequence[Tensor]) -> Tensor:
    """Of each new unit the networks that it has members of, as bits."""
    import torch

    found = torch.zeros(len(maps[0]), dtype=torch.long)
    for k, matrix in enumerate(maps):
        found += (matrix != 0).any(1).long() << k
    return found
