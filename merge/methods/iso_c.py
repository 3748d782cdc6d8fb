"""Iso-C: the sum of task vectors with a flat spectrum (Marczak et al. 2025, arXiv:2502.04959).

    d_k = W_k - B
    U diag(s) V^T = sum_k d_k
    s' = mean_i s_i
    out = B + lambda * s' U V^T

The mean is over the numerical rank: singular values below 1e-5 of the largest are left out, of the
mean and of U V^T. Where differences are of low rank, as those of LoRA are, the rest is rounding
noise that a flat spectrum would raise to the size of the signal. All that is not a matrix is B +
lambda * mean_k d_k, and so are matrices with a side over 8 times the other: vocabularies. A table
of positions is a matrix here, as it is in the authors' code.

Recipe::

    merge_method: iso_c
    base_model: base
    models:
      - model: a
      - model: b
"""

from __future__ import annotations

from merge.methods.core.schema import Operands, Tensor, method
from merge.methods.core.shapes import not_a_matrix
from merge.methods.core.spectral import added, scaled_mean, scratch, thin_svd


@method(space="delta", local="tensor", idempotent=False, scratch=scratch)
def iso_c(deltas: Operands, *, lambda_: float = 1.0) -> Tensor:
    """The base plus the sum of the differences to it, all singular values set to their mean.

    lambda: scales the result; tuned values for eight models are 1.3 to 1.5, and more for small
    ones.
    """
    u, s, v = thin_svd(added(deltas))
    mean = s.sum() / max(1, len(s))
    return (u * (lambda_ * mean)) @ v.T


iso_c.when(not_a_matrix)(scaled_mean)
