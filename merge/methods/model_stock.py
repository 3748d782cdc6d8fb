"""Model Stock: average fine-tunes and pull towards the base (Jang et al. 2024, arXiv:2403.19522).

    d_i = W_i - B
    c_ij = d_i . d_j / max(|d_i| |d_j|, 1e-6), clamped to [-1, 1]
    c = mean of c_ij over pairs i < j
    t = N c / (1 + (N - 1) c)              0 where |1 + (N - 1) c| < 1e-6
    out = t * mean_i W_i + (1 - t) B  =  B + (t / N) sum_i d_i

t is per tensor, or with filter_wise per row of it (a vector is one row), and is not clamped: it is
negative where the deltas oppose each other.

Recipe::

    merge_method: model_stock
    base_model: base
    models:
      - model: a
      - model: b
"""

from __future__ import annotations

import math
from itertools import combinations

from merge.methods.core.measure import Gram, inner_products
from merge.methods.core.schema import Coefficients, Operands, Tensor, method

_TINY = 1e-6


@method(space="delta", inputs=(2, None), measure=inner_products, idempotent=False)
def model_stock(*, filter_wise: bool = False, measured: Gram) -> Coefficients:
    """The mean of the models, moved towards the base by the angle between their differences to it.

    Deltas at right angles give the base (t = 0), parallel ones the mean (t = 1). filter_wise: an
    angle for each output unit.

    >>> model_stock.function(measured=[[1.0, 0.5], [0.5, 1.0]])  # c = 1/2, t = 2/3
    [0.3333333333333333, 0.3333333333333333]
    """
    n = len(measured)
    norms = [math.sqrt(measured[i][i]) for i in range(n)]
    cosines = [
        max(-1.0, min(1.0, measured[i][j] / max(norms[i] * norms[j], _TINY)))
        for i, j in combinations(range(n), 2)
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1.0 + (n - 1) * cosine
    ratio = n * cosine / divisor if abs(divisor) >= _TINY else 0.0
    return [ratio / n] * n


@model_stock.when(lambda _, parameters, __: parameters["filter_wise"], local="row")
def _filter_wise(deltas: Operands) -> Tensor:
    """The same with a cosine, and so a t, for each row."""
    import torch

    n = len(deltas)
    norms = [torch.linalg.vector_norm(d, dim=-1, keepdim=True) for d in deltas]
    cosine = torch.zeros_like(norms[0])
    for i, j in combinations(range(n), 2):
        product = (deltas[i] * deltas[j]).sum(-1, keepdim=True)
        cosine += (product / (norms[i] * norms[j]).clamp_(min=_TINY)).clamp_(-1.0, 1.0)
    cosine /= n * (n - 1) / 2
    divisor = 1.0 + (n - 1) * cosine
    ratio = torch.where(divisor.abs() >= _TINY, n * cosine / divisor, 0.0)
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total.mul_(ratio / n)
