"""Spherical interpolation of two models (Shoemake 1985, Animating rotation with quaternions).

    u_k = v_k / |v_k|              each tensor as one vector; kept as it is where |v_k| <= 1e-8
    c = u_0 . u_1
    |c| > 0.9995:   out = (1 - t) v_0 + t v_1
    else, with theta = acos c:
                    out = sin((1 - t) theta) / sin(theta) v_0 + sin(t theta) / sin(theta) v_1

The weights themselves are not normalised. Nearly all tensors of two fine-tunes of one base have
c > 0.9995, so their slerp is a plain interpolation.

Recipe::

    merge_method: slerp
    base_model: a
    models:
      - model: a
      - model: b
    parameters: {t: 0.3}
"""

import math

from merge.methods.core.measure import Gram, inner_products
from merge.methods.core.schema import Coefficients, method

NEARLY_PARALLEL = 0.9995


@method(
    space="weight", inputs=(2, 2), base="first operand", measure=inner_products, symmetric=False
)
def slerp(*, t: float, measured: Gram) -> Coefficients:
    """The point at fraction ``t`` of the way from the base to the other model, along the arc.

    t: 0 gives the base, 1 the other model; not clamped.

    >>> [round(c, 3) for c in slerp.function(t=0.5, measured=[[1.0, 0.0], [0.0, 4.0]])]
    [0.707, 0.707]
    """
    norms = [n if n > 1e-8 else 1.0 for n in (math.sqrt(measured[k][k]) for k in (0, 1))]
    cosine = max(-1.0, min(1.0, measured[0][1] / (norms[0] * norms[1])))
    if abs(cosine) > NEARLY_PARALLEL:
        return [1.0 - t, t]
    theta = math.acos(cosine)
    return [math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]
