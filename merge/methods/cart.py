"""CART: the average plus low-rank deviations from it (Choi et al. 2024, arXiv:2412.12153).

    A = mean_k W_k
    L_r(X) = the best approximation of X of rank r
    out = A + lambda * sum_k L_r(W_k - A),   r = max(1, round(rank * min side))

The base cancels, but serves as a common origin, so that small differences are what is rounded. All
that is not a matrix is A, and so are matrices with a side over 8 times the other: vocabularies. A
table of positions is a matrix here.

Recipe::

    merge_method: cart
    base_model: base
    models:
      - model: a
      - model: b
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.schema import Coefficients, Operands, Range, Tensor, method
from merge.methods.core.shapes import not_a_matrix
from merge.methods.core.spectral import added, scratch, thin_svd


@method(space="delta", local="tensor", scratch=scratch)
def cart(
    deltas: Operands,
    *,
    rank: Annotated[float, Range(0.0, 1.0)] = 0.08,
    lambda_: float = 1.0,
) -> Tensor:
    """The mean of the models plus the leading singular directions of each deviation from it.

    rank: fraction of the singular directions that is kept, in [0, 1]; the paper finds 0.08 best.
    lambda: scales the deviations; the authors tune it up to 2 for eight models. With rank 1 and
    lambda 1 the deviations cancel and the mean is left.
    """
    kept = max(1, round(rank * min(deltas[0].shape)))
    mean = added(deltas).div_(len(deltas))
    out = mean.clone()
    for delta in deltas:
        u, s, v = thin_svd(delta - mean, kept)
        out.addmm_(u * s, v.T, alpha=lambda_)
    return out


@cart.when(not_a_matrix)
def _mean(*, count: int) -> Coefficients:
    return [1.0 / count] * count
