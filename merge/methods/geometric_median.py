"""The geometric median of models: a mean that an outlier cannot pull away.

    out = argmin_y sum_i w_i |y - W_i|                each tensor as one vector

By the algorithm of Weiszfeld 1937, smoothed as in Pillutla et al. 2019 (arXiv:1912.13445), who use
it to aggregate models of which some may be corrupt:

    y = sum_i w_i W_i / sum_i w_i
    repeated, at most max_iter times:
        b_i = w_i / max(|y - W_i|, eps s)       s: the least distance of two models that differ
        y = sum_i b_i W_i / sum_i b_i
    until no coefficient b_i / sum_j b_j moves by more than tol

Up to half of the weight may lie in arbitrary models and the result stays near the others. One pass
over the tensor yields the inner products of the models' differences to the first of them, which
tell all distances: fine-tunes lie close together, and those of the models themselves would cancel.
The iteration works on coefficients and costs nothing.

Recipe::

    merge_method: geometric_median
    models:
      - model: a
      - model: b
      - model: c
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from merge.errors import RecipeError
from merge.methods.core.measure import Derived, Gram, Tiles, inner_products
from merge.methods.core.schema import Coefficients, Operands, PerModel, Range, each, method

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def spread(tiles: Tiles, **_: object) -> Gram:
    """The inner products of the operands' differences to the first one, (n, n), in float64."""
    n = tiles.count
    if n == 1:
        return [[0.0]]

    def differences(operands: Operands) -> Operands:
        return [x - operands[0] for x in operands[1:]]

    gram = inner_products(Derived(tiles, differences, n - 1))
    return [[0.0] * n, *([0.0, *row] for row in gram)]


@method(space="weight", measure=spread)
def geometric_median(
    *,
    weight: Annotated[PerModel[float], Range(low=0.0)] = each(1.0),
    max_iter: Annotated[int, Range(low=0.0)] = 1000,
    tol: Annotated[float, Range(low=0.0)] = 1e-9,
    eps: Annotated[float, Range(low=0.0, open_low=True)] = 1e-6,
    measured: Gram,
) -> Coefficients:
    """The point from which the sum of distances to the models is least.

    weight: one number a model, at least 0. max_iter: steps, at least 0, which gives the weighted
    mean. tol: change of a coefficient that ends the steps. eps: above 0; distances to a model below
    this fraction of the least between two of them count as this fraction.

    >>> line = [[0.0, 0.0, 0.0], [0.0, 1.0, 9.0], [0.0, 9.0, 81.0]]  # models at 0, 1 and 9
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
    gram, w = np.asarray(measured), np.asarray(weight)
    share = w / total
    between = [d for model in np.eye(len(w)) for d in _distances(model, gram) if d > 0.0]
    for _ in range(max_iter if between else 0):
        pull = w / np.maximum(_distances(share, gram), eps * min(between))
        before, share = share, pull / pull.sum()
        if np.abs(share - before).max() <= tol:
            break
    return [float(c) for c in share]


def _distances(share: Array, gram: Array) -> Array:
    """How far each model is from the combination with coefficients ``share``, which sum to 1."""
    import numpy as np

    offsets = share - np.eye(len(share))
    squares = np.einsum("ij,jk,ik->i", offsets, gram, offsets)
    out: Array = np.sqrt(np.maximum(squares, 0.0))
    return out
