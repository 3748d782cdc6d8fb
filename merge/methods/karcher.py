"""The Karcher mean of models on the sphere (Karcher 1977, Riemannian center of mass).

    n_i = |W_i|, u_i = W_i / n_i            each tensor as one vector; left out where n_i <= tol
    u = sum_i u_i / |sum_i u_i|             u_1 where |mean_i u_i| <= tol
    repeated, at most max_iter times:
        theta_i = acos(u . u_i)
        T = mean_i theta_i / sin(theta_i) (u_i - (u . u_i) u)     0 where sin(theta_i) <= tol
        |T| <= tol: end
        u = cos|T| u + sin|T| T / |T|, normalised
    out = (mean_i n_i) u

The mean length includes the models left out; where directions cancel, the first model decides. As
in mergekit (Goddard et al. 2024, arXiv:2403.13257) all models weigh the same, and a base that is
listed is one of them. mergekit takes the inner products in the models' own type, in bfloat16 to 8
bits, and divides by the sine of models opposite to the mean. Here one pass over the tensor yields
all inner products in float64, and the iteration works on coefficients of the W_i, at no cost.

Recipe::

    merge_method: karcher
    models:
      - model: a
      - model: b
      - model: c
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from merge.methods.core.measure import Gram, inner_products
from merge.methods.core.schema import Coefficients, Range, method

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@method(space="weight", measure=inner_products, symmetric=False)
def karcher(
    *,
    max_iter: Annotated[int, Range(low=0.0)] = 10,
    tol: Annotated[float, Range(low=0.0)] = 1e-5,
    measured: Gram,
) -> Coefficients:
    """The mean length of the models in the direction whose squared angles to theirs are least.

    max_iter: steps, at least 0, which gives the direction of the mean of the directions. tol: at
    least 0; steps, angles and lengths up to this count as 0.

    >>> [round(c, 3) for c in karcher.function(measured=[[1.0, 0.0], [0.0, 9.0]])]
    [1.414, 0.471]
    """
    import numpy as np

    norms = [math.sqrt(measured[i][i]) for i in range(len(measured))]
    kept = [i for i, norm in enumerate(norms) if norm > tol]
    out = [0.0] * len(norms)
    if not kept:
        return out
    lengths = np.array([norms[i] for i in kept])
    cosines = np.array([[measured[i][j] for j in kept] for i in kept]) / np.outer(lengths, lengths)
    np.fill_diagonal(cosines, 1.0)
    direction = _mean_direction(cosines, max_iter, tol) / lengths
    for i, coefficient in zip(kept, direction, strict=True):
        out[i] = float(coefficient) * sum(norms) / len(norms)
    return out


def _mean_direction(cosines: Array, max_iter: int, tol: float) -> Array:
    """u as coefficients of the unit vectors, whose inner products are ``cosines``."""
    import numpy as np

    n = len(cosines)
    u = np.full(n, 1.0 / n)
    u = u / length if (length := _length(u, cosines)) > tol else np.eye(n)[0]
    for _ in range(max_iter):
        c = np.clip(cosines @ u, -1.0, 1.0)
        theta = np.arccos(c)
        sine = np.sin(theta)
        pull = np.divide(theta, sine, out=np.zeros(n), where=sine > tol) / n
        tangent = pull - (pull @ c) * u
        step = _length(tangent, cosines)
        if step <= tol:
            break
        u = math.cos(step) * u + math.sin(step) / step * tangent
        u /= _length(u, cosines)
    return u


def _length(coefficients: Array, gram: Array) -> float:
    return math.sqrt(max(float(coefficients @ gram @ coefficients), 0.0))
