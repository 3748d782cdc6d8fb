"""DELLA: drop small differences likelier than large, elect (Deep et al. 2024, arXiv:2406.11617).

    d_i = W_i - B
    r = (rank - 1) / (n - 1)            rank of |d_i| in its row of n, ascending; 1/2 where n = 1
    p = density_i - epsilon_i + 2 epsilon_i r           clamped to [0, 1]
    m_i ~ Bernoulli(p), by counter from (seed, method, model, tensor, index)
    r_i = sum|d_i| / sum|d_i m_i|           1 without rescale
    v_i = w_i r_i d_i m_i
    s = +1 where sum_i v_i >= 0, else -1;   a_i = [sign(v_i) = s]
    out = B + lambda * sum_i v_i a_i            divided elementwise by sum_i w_i a_i if normalize

A density of 1 leaves all as it is, 0 nothing. A vector is one row, a convolution's kernel has one
for each output channel. Magnitudes that are equal to the precision of bfloat16 share their mean
rank, so that density is the expected fraction that is kept, unless p is clamped.

The paper divides each element by its own p; published recipes were made with mergekit's L1-matched
r_i. mergekit refuses a density within epsilon of 0 or 1, its default epsilon of 0.15 thus any from
0.85 on; here p is clamped. It ranks in the models' own type, in which bfloat16 tells no two ranks
above 256 apart but by steps, and fails on a matrix of one column.

Recipe::

    merge_method: della
    base_model: base
    models:
      - model: a
        parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}
      - model: b
        parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.consensus import elected
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
def della(
    deltas: Operands,
    *,
    weight: PerModel[float],
    density: Annotated[PerModel[float], Range(0.0, 1.0)] = each(1.0),
    epsilon: Annotated[PerModel[float], Range(0.0, 1.0)] = each(0.15),
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    measured: Drop,
    start: int,
    draw: Draw,
) -> Tensor:
    """The base plus the agreeing part of differences to it, thinned at random by magnitude.

    weight: one number a model. density: mean probability to keep an element, in [0, 1]. epsilon:
    how far the probability of a row's smallest lies below that and of its largest above, in [0, 1].
    rescale: restore each tensor's L1 norm. normalize: divide by the sum of the agreeing weights.
    lambda: scales the result. int8_mask: accepted, changes nothing.
    """
    thinned = drop_by_rank(deltas, density, epsilon, measured=measured, start=start, draw=draw)
    return elected(thinned, weight, measured.factors, normalize=normalize).mul_(lambda_)
