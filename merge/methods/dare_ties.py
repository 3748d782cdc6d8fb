"""DARE with the sign election of TIES (arXiv:2311.03099, arXiv:2306.01708).

    d_i = W_i - B
    m_i ~ Bernoulli(density_i), by counter from (seed, method, model, tensor, index)
    r_i = sum|d_i| / sum|d_i m_i|           1 without rescale
    v_i = w_i r_i d_i m_i
    s = +1 where sum_i v_i >= 0, else -1;   a_i = [sign(v_i) = s]
    out = B + lambda * sum_i v_i a_i            divided elementwise by sum_i w_i a_i if normalize

Recipe::

    merge_method: dare_ties
    base_model: base
    models:
      - model: a
        parameters: {weight: 0.5, density: 0.5}
      - model: b
        parameters: {weight: 0.5, density: 0.5}
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.consensus import drop_at_random, elected, restoring_factors
from merge.methods.core.measure import Draw
from merge.methods.core.schema import Operands, PerModel, Range, Tensor, each, method


@method(space="delta", measure=restoring_factors, idempotent=False, symmetric=False, random=True)
def dare_ties(
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
    """The base plus the agreeing part of randomly thinned differences to it.

    weight: one number a model. density: probability to keep an element, in [0, 1]. rescale: restore
    each tensor's L1 norm. normalize: divide by the sum of the agreeing weights. lambda: scales the
    result. int8_mask: accepted, changes nothing.
    """
    thinned = drop_at_random(deltas, density, start=start, draw=draw)
    return elected(thinned, weight, measured, normalize=normalize).mul_(lambda_)
