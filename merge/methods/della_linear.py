"""DELLA without the sign election: a plain weighted sum (Deep et al. 2024, arXiv:2406.11617).

    d_i = W_i - B
    r = (rank - 1) / (n - 1)            rank of |d_i| in its row of n, ascending; 1/2 where n = 1
    p = density_i - epsilon_i + 2 epsilon_i r           clamped to [0, 1]
    m_i ~ Bernoulli(p), by counter from (seed, method, model, tensor, index)
    r_i = sum|d_i| / sum|d_i m_i|           1 without rescale
    out = B + lambda * sum_i w_i r_i d_i m_i    divided by sum_i w_i if normalize

Rows, equal magnitudes and densities near 0 and 1 are treated as in della.

Recipe::

    merge_method: della_linear
    base_model: base
    models:
      - model: a
        parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}
      - model: b
        parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.consensus import summed
from merge.methods.core.measure import Draw
from merge.methods.core.ranks import Drop, drop_by_rank, measure_drop
from merge.methods.core.schema import Operands, PerModel, Range, Tensor, each, method


@method(
    space="delta",
    local="row",
    measure=measure_drop,
    idempotent=False,
    symmetric=False,
    random=True,
)
def della_linear(
    deltas: Operands,
    *,
    weight: PerModel[float],
    density: Annotated[PerModel[float], Range(0.0, 1.0)] = each(1.0),
    epsilon: Annotated[PerModel[float], Range(0.0, 1.0)] = each(0.15),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    measured: Drop,
    start: int,
    draw: Draw,
) -> Tensor:
    """The base plus the weighted sum of differences to it, thinned at random by magnitude.

    weight: one number a model. density: mean probability to keep an element, in [0, 1]. epsilon:
    how far the probability of a row's smallest lies below that and of its largest above, in [0, 1].
    rescale: restore each tensor's L1 norm. normalize: divide by the sum of the weights. lambda:
    scales the result. int8_mask: accepted, changes nothing.
    """
    thinned = drop_by_rank(deltas, density, epsilon, measured=measured, start=start, draw=draw)
    return summed(thinned, weight, measured.factors, normalize=normalize, scale=lambda_)
