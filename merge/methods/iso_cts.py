"""Iso-CTS: common and task-specific directions of one size (Marczak et al. 2025, arXiv:2502.04959).

    d_k = W_k - B
    U diag(s) V^T = sum_k d_k, of rank r
    t = round((1 - f) r / K) directions of each task,  c = r - K t common ones
    U_k diag(s_k) V_k^T = d_k - U[:, :c] U[:, :c]^T d_k
    U' = [U[:, :c], U_1[:, :t] ... U_K[:, :t]],  V' and s' likewise
    P(X) = the polar factor of X        (the nearest orthonormal columns)
    out = B + lambda * mean_i s'_i P(U') P(V')^T

f is common_space_fraction. As in Iso-C r is the numerical rank (singular values above 1e-5 of the
largest), so that differences of low rank have task-specific directions too. All that is not a
matrix is B + lambda * mean_k d_k, and so are matrices with a side over 8 times the other:
vocabularies. A table of positions is a matrix here, as it is in the authors' code.

Recipe::

    merge_method: iso_cts
    base_model: base
    models:
      - model: a
      - model: b
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.schema import Operands, Range, Tensor, method
from merge.methods.core.shapes import not_a_matrix
from merge.methods.core.spectral import NULL, added, polar, scaled_mean, scratch, thin_svd


@method(space="delta", local="tensor", idempotent=False, scratch=scratch)
def iso_cts(
    deltas: Operands,
    *,
    common_space_fraction: Annotated[float, Range(0.0, 1.0)] = 0.8,
    lambda_: float = 1.0,
) -> Tensor:
    """The base plus directions common to all models and own to each, all of one singular value.

    common_space_fraction: part of the directions that are the sum's, in [0, 1]. lambda: scales the
    result; tuned values for eight models are 1.3 to 1.5, and more for small ones.
    """
    import torch

    u, s, v = thin_svd(added(deltas))
    each = round((1.0 - common_space_fraction) * len(s) / len(deltas))
    common = max(0, len(s) - each * len(deltas))
    u, s, v = u[:, :common], s[:common], v[:, :common]
    parts = [(u, s, v), *(_specific(d, u, each) for d in deltas)]
    u, s, v = (torch.cat(factors, dim=-1) for factors in zip(*parts, strict=True))
    mean = s.sum() / max(1, len(s))
    return (polar(u) * (lambda_ * mean)) @ polar(v).T


def _specific(delta: Tensor, common: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading directions of what is left of a delta outside the common left space."""
    rest = delta - common @ (common.T @ delta)
    return thin_svd(rest, rank, null=NULL * float(delta.norm()))


iso_cts.when(not_a_matrix)(scaled_mean)
