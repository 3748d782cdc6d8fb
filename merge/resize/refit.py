"""Least squares for a linear map that is to do with fewer inputs what it did with all of them.

For inputs z with the kept ones z_S, and the old map W, b::

    min over W', b' of  E || W z + b - W' z_S - b' ||^2  +  r tr(C) / n  || W' - W_S ||^2

W' - W_S = W (C[:, S] - I[:, S] C[S, S]) (C[S, S] + r tr(C) / n I)^-1 and b' = b + W mu - W' mu_S,
with C the covariance of the inputs (their second moment, where the map has no bias) and mu their
mean. The ridge r draws to the plain slice W_S, not to zero: without data nothing changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["least_norm", "refitted"]


def refitted(
    weight: Tensor,
    bias: Tensor | None,
    moments: Tensor,
    kept: Tensor,
    ridge: float = 1e-4,
) -> tuple[Tensor, Tensor | None]:
    """W' (out, |S|) and b' (out,) in float64.

    weight: (out, in). moments: E [z, 1] [z, 1]^T, (in + 1, in + 1). kept: the indices S. PlanError
    for a ridge below zero or moments of another size.
    """
    import torch

    count = weight.shape[1]
    if tuple(moments.shape) != (count + 1, count + 1):
        raise PlanError(
            "the moments are not of this layer's inputs",
            found=list(moments.shape),
            expected=[count + 1, count + 1],
        )
    if ridge < 0:
        raise PlanError("the ridge is below zero", found=ridge, expected="0 or more")
    weight, moments = weight.double(), moments.double()
    mean = moments[-1, :count] / moments[-1, -1].clamp(min=1e-300)
    spread = moments[:count, :count] / moments[-1, -1].clamp(min=1e-300)
    if bias is not None:
        spread = spread - torch.outer(mean, mean)
    inner = spread[kept][:, kept]
    damping = ridge * spread.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    gap = weight @ spread[:, kept] - weight[:, kept] @ inner
    change = least_norm(inner + damping, gap.T).T
    new = weight[:, kept] + change
    if bias is None:
        return new, None
    return new, bias.double() + weight @ mean - new @ mean[kept]


def least_norm(matrix: Tensor, right: Tensor) -> Tensor:
    """The least-norm solution of a symmetric system that may be singular."""
    import torch

    values, vectors = torch.linalg.eigh(matrix)
    floor = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(values > floor, 1.0 / values, torch.zeros_like(values))
    found: Tensor = vectors @ (inverse[:, None] * (vectors.T @ right))
    return found
