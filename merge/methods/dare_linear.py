"""DARE: drop elements of task vectors at random, rescale, sum (Yu et al. 2023, arXiv:2311.03099).

    d_i = W_i - B
    m_i ~ Bernoulli(density_i), by counter from (seed, method, model, tensor, index)
    r_i = sum|d_i| / sum|d_i m_i|           1 without rescale
    out = B + lambda * sum_i w_i r_i d_i m_i    divided by sum_i w_i if normalize

The paper rescales by 1/density, which r_i equals on average; published recipes were made with
mergekit's L1-matched r_i, so that is what stands here.

Recipe::

    merge_method: dare_linear
    base_model: base
    models:
      - model: a
        parameters: {weight: 0.5, density: 0.5}
      - model: b
        parameters: {weight: 0.5, density: 0.5}
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.consensus import drop_at_random, restoring_factors, summed
from merge.methods.core.measure import Draw
from merge.methods.core.schema import Operands, PerModel, Range, Tensor, each, method


@method(space="delta", measure=restoring_factors, idempotent=False, symmetric=False, random=True)
def dare_linear(
    deltas: Operands,
    *,
    weight: PerModel[float],
    density: Annotated[PerModel[float], Range(0.0, 1.0)] = each(1.0),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    measured: list[float],
    start: int,
    draw: Draw,
) -> Tensor:
    """The base plus the weighted sum of randomly thinned differences to it.

    weight: one number a model. density: probability to keep an element, in [0, 1]. rescale: restore
    each tensor's L1 norm. normalize: divide by the sum of the weights. lambda: scales the
    result. int8_mask: accepted, changes nothing.
    """
    thinned = drop_at_random(deltas, density, start=start, draw=draw)
    return summed(thinned, weight, measured, normalize=normalize, scale=lambda_)
