"""Model Breadcrumbs with the sign election of TIES (arXiv:2312.06795, arXiv:2306.01708).

    d_i = W_i - B, as N elements in ascending order of magnitude
    keep = int(density_i N),   top = int(gamma_i N),   bottom = N - keep - top
    m_i = [bottom <= rank < N - top]        where bottom < 0: rank < keep
    r_i = sum|d_i| / sum|d_i m_i|           1 without rescale
    v_i = w_i r_i d_i m_i
    s = +1 where sum_i v_i >= 0, else -1;   a_i = [sign(v_i) = s]
    out = B + lambda * sum_i v_i a_i            divided elementwise by sum_i w_i a_i if normalize

Densities of 1 and small tensors are treated as in breadcrumbs.

Recipe::

    merge_method: breadcrumbs_ties
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
from merge.methods.core.consensus import elected
from merge.methods.core.schema import Operands, PerModel, Range, Tensor, each, method


@method(space="delta", measure=bands, idempotent=False)
def breadcrumbs_ties(
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
    """The base plus the agreeing part of the differences to it, without small ones and outliers.

    weight: one number a model. density: kept fraction of each task vector, in [0, 1]. gamma: the
    fraction dropped at the top, in [0, 1]. rescale: restore each tensor's L1 norm. normalize:
    divide by the sum of the agreeing weights. lambda: scales the result. int8_mask: accepted,
    changes nothing.
    """
    kept, factors = measured
    crumbs = [band(d, k, start) for d, k in zip(deltas, kept, strict=True)]
    return elected(crumbs, weight, factors, normalize=normalize).mul_(lambda_)
