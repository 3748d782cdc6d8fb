"""TSV-M: leading singular directions, decorrelated between tasks (Gargiulo et al. 2024,
arXiv:2412.00081).

For a matrix with min side r, and K models::

    d_k = W_k - B = U_k S_k V_k^T
    q = floor(r / K), at least 1
    U = [U_1[:, :q] ... U_K[:, :q]],  V likewise,  S = diag(S_1[:q], ..., S_K[:q])
    P(X) = the polar factor of X        (whitening: the nearest orthonormal columns)
    out = B + lambda * P(U) S P(V)^T

Directions of no weight (below 1e-5 of the largest) do not enter U and V; a full SVD would fill q
columns with arbitrary ones, which turn the others when whitened. All that is not a matrix is B +
lambda * mean_k d_k, and so are matrices with a side over 8 times the other: vocabularies. A table
of positions is a matrix here, as it is in the authors' code.

Recipe::

    merge_method: tsv
    base_model: base
    models:
      - model: a
      - model: b
"""

from __future__ import annotations

from merge.methods.core.schema import Operands, Tensor, method
from merge.methods.core.shapes import not_a_matrix
from merge.methods.core.spectral import polar, scaled_mean, scratch, thin_svd


@method(space="delta", local="tensor", idempotent=False, scratch=scratch)
def tsv(deltas: Operands, *, lambda_: float = 1.0) -> Tensor:
    """The base plus the leading singular directions of each difference to it, made orthogonal.

    lambda: scales the result; the paper's optimum is near 1, small models liked 2.
    """
    import torch

    each = max(1, min(deltas[0].shape) // len(deltas))
    parts = [thin_svd(d, each) for d in deltas]
    u, s, v = (torch.cat(factors, dim=-1) for factors in zip(*parts, strict=True))
    return (polar(u) * (lambda_ * s)) @ polar(v).T


tsv.when(not_a_matrix)(scaled_mean)
