"""Model Breadcrumbs: no small ones, no outliers (Davari & Belilovsky 2023, arXiv:2312.06795).

    d_i = W_i - B, as N elements in ascending order of magnitude
    keep = int(density_i N),   top = int(gamma_i N),   bottom = N - keep - top
    m_i = [bottom <= rank < N - top]        where bottom < 0: rank < keep
    r_i = sum|d_i| / sum|d_i m_i|           1 without rescale
    out = B + lambda * sum_i w_i r_i d_i m_i    divided by sum_i w_i if normalize

A density of 1 leaves all as it is whatever gamma says: recipes that name neither rely on it. Among
equal magnitudes the first in memory order count as the larger. mergekit 0.1.4 loses the whole
tensor where top is 0; here, and from mergekit 0.1.5 on, the largest elements then stay.

Recipe::

    merge_method: breadcrumbs
    base_model: base
    models:
      - model: a
        parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
      - model: b
        parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.bands import Band, band, bands
from merge.methods.core.consensus import summed
from merge.methods.core.schema import Operands, PerModel, Range, Tensor, each, method


@method(space="delta", measure=bands, idempotent=False)
def breadcrumbs(
    deltas: Operands,
    *,
    weight: PerModel[float],
    density: Annotated[PerModel[float], Range(0.0, 1.0)] = each(1.0),
    gamma: Annotated[PerModel[float], Range(0.0, 1.0)] = each(0.01),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    measured: tuple[list[Band], list[float]],
    start: int,
) -> Tensor:
    """The base plus the weighted sum of the differences to it, without small ones and outliers.

    weight: one number a model. density: kept fraction of each task vector, in [0, 1]. gamma: the
    fraction dropped at the top, in [0, 1]. rescale: restore each tensor's L1 norm. normalize:
    divide by the sum of the weights. lambda: scales the result. int8_mask: accepted, changes
    nothing.
    """
    kept, factors = measured
    crumbs = [band(d, k, start) for d, k in zip(deltas, kept, strict=True)]
    return summed(crumbs, weight, factors, normalize=normalize, scale=lambda_)
