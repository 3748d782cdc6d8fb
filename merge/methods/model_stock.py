"""Model Stock: average fine-tunes and pull towards the base (Jang et al. 2024, arXiv:2403.19522).

    d_i = W_i - B
    c_ij = d_i . d_j / max(|d_i| |d_j|, 1e-6), clamped to [-1, 1]
    c = mean of c_ij over pairs i < j                      (cos: mean)
    c = cos(mean of arccos c_ij over pairs i < j)          (cos: angle)
    c = sum_{i != j} d_i . d_j / ((N - 1) sum_i |d_i|^2)   (cos: lsq)
    t = N c / (1 + (N - 1) c)                              c below 0 counts as 0
    out = t * mean_i W_i + (1 - t) B  =  B + (t / N) sum_i d_i

t is per tensor, or with filter_wise per row of it (a vector is one row). It is the point of the
line from the base to the mean that is nearest to the centre from which the d_i are seen at one
angle and distance. lsq is that projection for differences of unequal length, too; for equal ones
all but angle are the same. Differences that oppose each other give the base. mergekit lets t become
negative there, past the base, and infinite at c = -1 / (N - 1): clamp: false.

Recipe::

    merge_method: model_stock
    base_model: base
    models:
      - model: a
      - model: b
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from merge.errors import RecipeError
from merge.methods.core.measure import Gram, inner_products
from merge.methods.core.schema import Coefficients, Operands, Tensor, method

_TINY = 1e-6
_COSINES = ("mean", "angle", "lsq")


@method(space="delta", inputs=(2, None), measure=inner_products, idempotent=False)
def model_stock(
    *, cos: str = "mean", filter_wise: bool = False, clamp: bool = True, measured: Gram
) -> Coefficients:
    """The mean of the models, moved towards the base by the angle between their differences to it.

    Differences at right angles give the base (t = 0), parallel ones the mean (t = 1). cos: how
    several angles are one, mean, angle or lsq. filter_wise: an angle for each output unit. clamp:
    no t below 0.

    >>> model_stock.function(measured=[[1.0, 0.5], [0.5, 1.0]])  # c = 1/2, t = 2/3
    [0.3333333333333333, 0.3333333333333333]
    """
    n = len(measured)
    pairs = list(combinations(range(n), 2))
    if cos == "lsq":
        energy = (n - 1) * sum(measured[i][i] for i in range(n))
        cosine = 2.0 * sum(measured[i][j] for i, j in pairs) / energy if energy else 0.0
    else:
        norms = [math.sqrt(measured[i][i]) for i in range(n)]
        cosines = [
            max(-1.0, min(1.0, measured[i][j] / max(norms[i] * norms[j], _TINY))) for i, j in pairs
        ]
        cosine = (
            math.cos(sum(map(math.acos, cosines)) / len(cosines))
            if cos == "angle"
            else sum(cosines) / len(cosines)
        )
    cosine = max(0.0, cosine) if clamp else cosine
    divisor = 1.0 + (n - 1) * cosine
    ratio = n * cosine / divisor if abs(divisor) >= _TINY else 0.0
    return [ratio / n] * n


def _by_rows(_shape: tuple[int, ...], parameters: Mapping[str, Any], _: bool | None) -> bool:
    if parameters["cos"] not in _COSINES:
        raise RecipeError(
            "'cos' names no way to make one angle of several",
            key="cos",
            found=repr(parameters["cos"]),
            expected=", ".join(_COSINES),
        )
    return bool(parameters["filter_wise"])


@model_stock.when(_by_rows, local="row")
def _filter_wise(deltas: Operands, *, cos: str, clamp: bool) -> Tensor:
    """The same with a cosine, and so a t, for each row."""
    import torch

    n = len(deltas)
    norms = [torch.linalg.vector_norm(d, dim=-1, keepdim=True) for d in deltas]
    cosine = torch.zeros_like(norms[0])
    for i, j in combinations(range(n), 2):
        product = (deltas[i] * deltas[j]).sum(-1, keepdim=True)
        if cos == "lsq":
            cosine += product
            continue
        own = (product / (norms[i] * norms[j]).clamp_(min=_TINY)).clamp_(-1.0, 1.0)
        cosine += own.acos_() if cos == "angle" else own
    cosine /= n * (n - 1) / 2
    if cos == "angle":
        cosine.cos_()
    elif cos == "lsq":
        energy = torch.stack([x.square() for x in norms]).mean(0)
        cosine = torch.where(energy > 0.0, cosine / energy, 0.0)
    if clamp:
        cosine.clamp_(min=0.0)
    divisor = 1.0 + (n - 1) * cosine
    ratio = torch.where(divisor.abs() >= _TINY, n * cosine / divisor, 0.0)
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total.mul_(ratio / n)
