"""Least squares for one linear map of two networks joined in part, in closed form.

With inputs zbar and targets ybar in the joined network's units::

    min over W, b of  E || W zbar + b - ybar ||^2  +  r tr(C) / n  || W - W0 ||^2

where W is zero wherever one network's own units would read the other's, and C is the covariance of
the inputs (their second moment where there is no bias). Rows fall into three blocks, common ones
and each network's own, and each block has its own smaller set of inputs, so the problem is solved
block by block. The ridge r draws to the joined weights W0: without data nothing changes. PLeaS
(Nasery et al. 2024, arXiv:2407.02447) takes 400 steps of Adam to the same minimum without the
ridge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.errors import PlanError
from merge.resize.refit import least_norm

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Normal", "error_of", "fitted"]


@dataclass(frozen=True, slots=True, eq=False)
class Normal:
    """Second moments of a map's inputs and targets, in float64.

    gram: E [z, 1] [z, 1]', (in + 1, in + 1). cross: E y [z, 1]', (out, in + 1). energy: E y^2,
    (out,).
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor


def fitted(
    weight: Tensor,
    bias: Tensor | None,
    normal: Normal,
    rows: Tensor,
    columns: Tensor,
    ridge: float = 1e-4,
) -> tuple[Tensor, Tensor | None]:
    """W (out, in) and b (out,) in float64. weight, bias: W0 and b0.

    rows, columns: of which networks outputs and inputs are, as bits; an output reads the inputs
    with which it has a network in common. PlanError for a ridge below zero.
    """
    import torch

    if ridge < 0:
        raise PlanError("the ridge is below zero", found=ridge, expected="0 or more")
    size = weight.shape[1]
    mean, target = normal.gram[-1, :size], normal.cross[:, -1]
    spread, cross = normal.gram[:size, :size], normal.cross[:, :size]
    if bias is not None:
        spread = spread - torch.outer(mean, mean)
        cross = cross - torch.outer(target, mean)
    new = weight.double().clone()
    level = ridge * spread.diagonal().mean()
    for kind in sorted(set(rows.tolist())):
        chosen = torch.nonzero(rows == kind).flatten()
        read = torch.nonzero((columns & kind) != 0).flatten()
        inner = spread[read][:, read]
        start = new[chosen][:, read]
        gap = cross[chosen][:, read] - start @ inner
        damped = inner + level * torch.eye(len(read), dtype=torch.float64)
        new[chosen[:, None], read] = start + least_norm(damped, gap.T).T
    return new, None if bias is None else target - new @ mean


def error_of(weight: Tensor, bias: Tensor | None, normal: Normal) -> float:
    """E || W z + b - y ||^2 over all outputs, as a share of E || y ||^2."""
    import torch

    shift = torch.zeros(len(weight)) if bias is None else bias
    full = torch.cat([weight.double(), shift.double()[:, None]], 1)
    rest = normal.energy.sum() - 2 * (full * normal.cross).sum()
    rest = rest + ((full @ normal.gram) * full).sum()
    return max(0.0, float(rest / normal.energy.sum().clamp(min=1e-300)))
