"""Spherical interpolation of any number of models (Goddard et al. 2024, arXiv:2403.13257).

    x_i = W_i, or with a base W_i - B;  w_i divided by sum_i w_i if normalize_weights
    u_i = x_i / (|x_i| + eps)       0 where |x_i| <= eps
    m = sum_i w_i u_i
    out = (sum_i w_i |x_i|) m / |m|                                        (plus B)

mergekit goes from m / |m| along the exponential map by the weighted sum of the u_i projected to the
tangent space there. That sum, m minus its part along m, is exactly 0, so what mergekit adds is
rounding; this is the whole result. One model is returned as it is. Where the directions cancel
(|m| <= 0.001 sum_i |w_i|) there is no mean direction, and the x_i are summed by weight. mergekit
does so for two models that are exactly opposite, divides by rounding where they nearly are, and
stops with an error for more than two.

Recipe::

    merge_method: multislerp
    models:
      - model: a
        parameters: {weight: 0.5}
      - model: b
        parameters: {weight: 0.3}
      - model: c
        parameters: {weight: 0.2}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from merge.errors import RecipeError
from merge.methods.core.measure import Gram, inner_products
from merge.methods.core.schema import Coefficients, PerModel, Range, method

_CANCELLED = 1e-3  # a mean of unit vectors this short has lost three digits of its direction


@method(space="either", measure=inner_products)
def multislerp(
    *,
    weight: PerModel[float],
    normalize_weights: bool = True,
    eps: Annotated[float, Range(0.0, 1e-3, open_low=True)] = 1e-8,
    measured: Gram,
) -> Coefficients:
    """The mean length of the models, or of their differences to a base, in their mean direction.

    weight: one number a model. normalize_weights: divide them by their sum, which must not be 0.
    eps: above 0 and at most 0.001; shorter vectors have no direction.

    >>> at_right_angles = [[1.0, 0.0], [0.0, 1.0]]
    >>> [round(c, 3) for c in multislerp.function(weight=(1.0, 1.0), measured=at_right_angles)]
    [0.707, 0.707]
    """
    n = len(weight)
    if n == 1:
        return [1.0]
    shares = _normalized(weight) if normalize_weights else list(weight)
    norms = [math.sqrt(measured[i][i]) for i in range(n)]
    mean = [  # m, as a combination of the x_i
        w / (norm + eps) if norm > eps else 0.0 for w, norm in zip(shares, norms, strict=True)
    ]
    square = sum(mean[i] * mean[j] * measured[i][j] for i in range(n) for j in range(n))
    length = math.sqrt(max(square, 0.0))
    if length <= _CANCELLED * sum(abs(w) for w in shares):  # also where all weights are 0
        return shares
    scale = sum(w * norm for w, norm in zip(shares, norms, strict=True)) / length
    return [scale * c for c in mean]


def _normalized(weight: Sequence[float]) -> list[float]:
    total = sum(weight)
    if abs(total) < 1e-8:
        raise RecipeError(
            "the weights of a normalised multislerp sum to 0",
            key="weight",
            found=f"{list(weight)}",
            expected="a sum that is not 0",
            do="change a weight, or set normalize_weights: false",
        )
    return [w / total for w in weight]
