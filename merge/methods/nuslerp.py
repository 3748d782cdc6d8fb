"""Spherical interpolation with weights, also by row or column (mergekit, Goddard et al. 2024,
arXiv:2403.13257).

The interpolation is that of Shoemake 1985.

    x_k = W_k, or with a base W_k - B
    t = w_2 / (w_1 + w_2)                    1/2 where |w_1 + w_2| < 1e-6
    u_k = x_k / max(|x_k|, 1e-7)
    theta = acos(u_1 . u_2)
    out = sin((1 - t) theta) / sin(theta) x_1 + sin(t theta) / sin(theta) x_2        (plus B)

Where 1 - cos^2 theta <= 1e-6 the x_k are interpolated straight, (1 - t) x_1 + t x_2: for vectors
that point one way this is the arc to single precision, and opposite ones have no arc. `slerp` does
so from a cosine of 0.9995 on. mergekit's bound is 1e-16, which no cosine is exact enough for, so
that opposite vectors are blown up by rounding; and it takes the cosine in the models' own type, in
bfloat16 to 8 bits.

Recipe::

    merge_method: nuslerp
    models:
      - model: a
        parameters: {weight: 0.7}
      - model: b
        parameters: {weight: 0.3}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from merge.methods.core.measure import Gram, inner_products
from merge.methods.core.schema import Coefficients, Operands, PerModel, Tensor, method

_TINY_NORM, _TINY_WEIGHT, _COLINEAR = 1e-7, 1e-6, 1e-6


@method(space="either", inputs=(2, 2), measure=inner_products)
def nuslerp(
    *,
    weight: PerModel[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    measured: Gram,
) -> Coefficients:
    """The point between two models, or their differences to a base, along the arc.

    weight: one number a model; their ratio says where on the arc. nuslerp_flatten: take a tensor as
    one vector, else each row by itself (what one output unit reads). nuslerp_row_wise: without
    nuslerp_flatten, each column, along the first axis, in place of each row.

    >>> at_right_angles = [[1.0, 0.0], [0.0, 4.0]]
    >>> [round(c, 3) for c in nuslerp.function(weight=(2.0, 1.0), measured=at_right_angles)]
    [0.866, 0.5]
    """
    t = _fraction(weight)
    norms = [max(math.sqrt(measured[k][k]), _TINY_NORM) for k in (0, 1)]
    cosine = max(-1.0, min(1.0, measured[0][1] / (norms[0] * norms[1])))
    if 1.0 - cosine * cosine <= _COLINEAR:
        return [1.0 - t, t]
    theta = math.acos(cosine)
    return [math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]


@nuslerp.when(
    lambda _, parameters, __: not parameters["nuslerp_flatten"] and parameters["nuslerp_row_wise"],
    local="tensor",
)
def _columns(operands: Operands, *, weight: PerModel[float]) -> Tensor:
    """The same for each column."""
    return _along(0, operands, _fraction(weight))


@nuslerp.when(lambda _, parameters, __: not parameters["nuslerp_flatten"], local="row")
def _rows(operands: Operands, *, weight: PerModel[float]) -> Tensor:
    """The same for each row."""
    return _along(-1, operands, _fraction(weight))


def _fraction(weight: Sequence[float]) -> float:
    """How far from the first model to the second."""
    total = sum(weight)
    return weight[1] / total if abs(total) >= _TINY_WEIGHT else 0.5


def _along(axis: int, operands: Operands, t: float) -> Tensor:
    """The interpolation of all vectors that lie along one axis."""
    import torch

    first, second = operands
    norms = [torch.linalg.vector_norm(x, dim=axis, keepdim=True) for x in operands]
    divisor = norms[0].clamp_(min=_TINY_NORM) * norms[1].clamp_(min=_TINY_NORM)
    cosine = ((first * second).sum(axis, keepdim=True) / divisor).clamp_(-1.0, 1.0)
    theta = cosine.acos()
    straight = 1.0 - cosine * cosine <= _COLINEAR
    start = torch.where(straight, 1.0 - t, torch.sin((1.0 - t) * theta) / torch.sin(theta))
    stop = torch.where(straight, t, torch.sin(t * theta) / torch.sin(theta))
    return (first * start).add_(second * stop)
