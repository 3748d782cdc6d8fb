"""The geometric median of models: a mean that an outlier cannot pull away (Pillutla et al. 2019,
arXiv:1912.13445).

    out = argmin_y sum_i w_i |y - W_i|                each tensor as one vector

By the algorithm of Weiszfeld 1937, smoothed as in the paper, which uses it to aggregate models of
which some may be corrupt:

    y = sum_i w_i W_i / sum_i w_i
    repeated, at most max_iter times:
        b_i = w_i / max(|y - W_i|, eps s)       s: the least distance of two models that differ
        y = sum_i b_i W_i / sum_i b_i
    until no coefficient b_i / sum_j b_j moves by more than tol

Less than half of the weight may lie in arbitrary models and the result stays near the others. One
pass over the tensor yields the distance of every two models, from their difference: fine-tunes lie
close together, and inner products of the models themselves would cancel. The iteration works on
coefficients and costs nothing.

Recipe::

    merge_method: geometric_median
    models:
      - model: a
      - model: b
      - model: c
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

from merge.errors import RecipeError
from merge.methods.core.measure import Tiles, blocks
from merge.methods.core.schema import Coefficients, PerModel, Range, each, method

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Table = Sequence[Sequence[float]]


def squared_distances(tiles: Tiles, **_: object) -> Table:
    """Of every two operands, (n, n), in float64."""
    out = [[0.0] * tiles.count for _ in range(tiles.count)]
    for _start, operands in tiles():
        for i, j in combinations(range(tiles.count), 2):
            for part in blocks(operands[i] - operands[j]):
                out[i][j] += float(part.dot(part))
            out[j][i] = out[i][j]
    return out


@method(space="weight", measure=squared_distances)
def geometric_median(
    *,
    weight: Annotated[PerModel[float], Range(low=0.0)] = each(1.0),
    max_iter: Annotated[int, Range(low=0.0)] = 1000,
    tol: Annotated[float, Range(low=0.0)] = 1e-9,
    eps: Annotated[float, Range(low=0.0, open_low=True)] = 1e-6,
    measured: Table,
) -> Coefficients:
    """The point from which the sum of distances to the models is least.

    weight: one number a model, at least 0. max_iter: steps, at least 0, which gives the weighted
    mean. tol: change of a coefficient that ends the steps. eps: above 0; distances to a model below
    this fraction of the least between two of them count as this fraction.

    >>> line = [[0.0, 1.0, 81.0], [1.0, 0.0, 64.0], [81.0, 64.0, 0.0]]  # models at 0, 1 and 9
    >>> [round(c, 3) for c in geometric_median.function(weight=(1.0,) * 3, measured=line)]
    [0.0, 1.0, 0.0]
    """
    import numpy as np

    total = sum(weight)
    if total == 0.0:
        raise RecipeError(
            "the weights of a geometric median are all 0",
            key="weight",
            found=f"{list(weight)}",
            expected="a weight above 0",
        )
    between, w = np.asarray(measured), np.asarray(weight)
    share = w / total
    floor = eps * math.sqrt(min(between[between > 0.0], default=0.0))
    for _ in range(max_iter if floor > 0.0 else 0):
        pull = w / np.maximum(_distances(share, between), floor)
        before, share = share, pull / pull.sum()
        if np.abs(share - before).max() <= tol:
            break
    return [float(c) for c in share]


def _distances(share: Array, between: Array) -> Array:
    """How far each model is from the combination with coefficients ``share``, which sum to 1.

    |sum_i o_i W_i|^2 = -1/2 sum_ij o_i o_j |W_i - W_j|^2 where the o_i sum to 0.
    """
    import numpy as np

    offsets = share - np.eye(len(share))
    squares = np.einsum("ij,jk,ik->i", offsets, between, offsets)
    out: Array = np.sqrt(np.maximum(-0.5 * squares, 0.0))
    return out
