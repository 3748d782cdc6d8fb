"""Gram matrices of the inputs of linear layers: their layout, and least squares with them.

A layer's Gram matrix is C = X^T X / n over its n inputs, the rows of X. Its shape says how the
weight reads them:

=====================  ===========================================================================
C                      weight
=====================  ===========================================================================
(in, in)               outputs come first, all other axes are inputs: (out, in), (out, in, h, w)
(groups, in, in)       groups of outputs with inputs of their own: (groups * out, in, h, w), and a
                       stack of maps, (groups, out, in)
(in, in, 1)            inputs come first: (in, out), as in GPT-2's Conv1D
=====================  ===========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from merge.errors import PlanError
from merge.methods.core.schema import Tensor

__all__ = ["check_gram", "scratch", "solved", "square", "stacked", "unstacked"]


def scratch(gram: tuple[int, ...], _count: int) -> int:
    """Elements of float32: the sum in float64, one summand, its factor, eigenvectors, a copy."""
    return 10 * math.prod(gram)


def check_gram(weight: tuple[int, ...], gram: tuple[int, ...]) -> None:
    """PlanError unless a Gram matrix of this shape is of the inputs of such a weight.

    >>> for c in ((4, 4), (3, 4, 4), (6, 6, 1)):
    ...     check_gram((6, 4), c)
    """
    if not _fits(weight, gram):
        outer, *inner = weight or (0,)
        inputs = math.prod(inner)
        raise PlanError(
            "a statistic is no Gram matrix of the inputs of its weight",
            found=f"a statistic of shape {list(gram)}, a weight of shape {list(weight)}",
            expected=f"[{inputs}, {inputs}], or [{outer}, {outer}, 1] where inputs come first",
            do="gather it anew: merge statistics MODEL --kind gram",
        )


def _fits(weight: tuple[int, ...], gram: tuple[int, ...]) -> bool:
    if len(weight) < 2 or len(gram) not in (2, 3):
        return False
    if len(gram) == 3 and gram[2] == 1:
        return len(weight) == 2 and gram[:2] == (weight[0], weight[0])
    groups = gram[0] if len(gram) == 3 else 1
    rows = math.prod(weight) // max(1, gram[-1])
    return (
        gram[-1] == gram[-2]
        and groups > 0
        and rows * gram[-1] == math.prod(weight)
        and rows % groups == 0
        and gram[-1] in (math.prod(weight[1:]), weight[-1])
    )


def stacked(weight: Tensor, gram: tuple[int, ...]) -> Tensor:
    """The weight in float64 as a stack of maps, (groups, out, in)."""
    if len(gram) == 3 and gram[2] == 1:
        return weight.double().T[None]
    return weight.double().reshape(gram[0] if len(gram) == 3 else 1, -1, gram[-1])


def square(gram: Tensor) -> Tensor:
    """A Gram matrix in float64 as a stack of them, (groups, in, in)."""
    inputs = gram.shape[1]
    return gram.double().reshape(-1, inputs, inputs)


def unstacked(maps: Tensor, like: Tensor, gram: tuple[int, ...]) -> Tensor:
    """A stack of maps in the shape and type of the weight."""
    if len(gram) == 3 and gram[2] == 1:
        maps = maps[0].T
    return maps.reshape(like.shape).to(like.dtype)


def solved(
    maps: Callable[[int], Tensor],
    grams: Callable[[int], Tensor],
    weights: Sequence[float],
    *,
    alpha: float,
    ridge: float,
) -> Tensor:
    """sum_k w_k D_k C_k (sum_k w_k C_k + e I)^-1, of stacks of maps (groups, out, in) in float64.

    maps: the k-th D. grams: the k-th C, (groups, in, in). alpha: factor of what is off the
    diagonal. ridge: e, of the mean eigenvalue. Where rounding makes the sum indefinite, directions
    of no weight are left out: 0 comes out there.
    """
    import torch

    left: Tensor | None = None
    right: Tensor | None = None
    for k, weight in enumerate(weights):
        own = grams(k) * weight
        if alpha != 1.0:
            diagonal = own.diagonal(dim1=-2, dim2=-1).clone()
            own *= alpha
            own.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        product = maps(k) @ own
        left = own if left is None else left.add_(own)
        right = product if right is None else right.add_(product)
    assert left is not None
    assert right is not None
    least = ridge * left.diagonal(dim1=-2, dim2=-1).mean(-1)
    pulled = left.clone()
    pulled.diagonal(dim1=-2, dim2=-1).add_(least[:, None])
    factor, failed = torch.linalg.cholesky_ex(pulled)
    if not failed.any():
        return torch.cholesky_solve(right.mT, factor).mT
    return _pseudo_solved(left, right, least)


def _pseudo_solved(left: Tensor, right: Tensor, least: Tensor) -> Tensor:
    """``right`` times the pseudo-inverse of ``left``, without eigenvalues up to ``least``.

    Nor those below the rounding of float32 in the largest, in which Gram matrices are stored.
    """
    import torch

    values, vectors = torch.linalg.eigh(left)
    cut = torch.maximum(least, values[:, -1] * left.shape[-1] * 2.0**-24)[:, None]
    inverse = torch.where(values > cut, values.reciprocal(), 0.0)
    found: Tensor = ((right @ vectors) * inverse[:, None, :]) @ vectors.mT
    return found
