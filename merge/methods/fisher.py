"""Fisher-weighted averaging (Matena and Raffel 2022, arXiv:2111.09832).

    F_i = mean over examples of the square of the gradient of the log-likelihood, for each weight
    f_i = w_i max(F_i, floor)
    out = sum_i f_i W_i / sum_i f_i          elementwise

F_i, the diagonal of the empirical Fisher information, is a file of the same tensors as the model
(``statistics`` under each model of a recipe). It is to be made of gradients of single examples: the
square of a batch's gradient is systematically too small. Weights that no example moved have F = 0
and are averaged plainly, which is what the floor is for. With normalize each tensor's F_i is first
divided by its L2 norm, so that a model with larger gradients does not outvote the others; a norm
over a whole model goes into the weight.

Recipe::

    merge_method: fisher
    models:
      - model: a
        statistics: a-fisher
      - model: b
        statistics: b-fisher
"""

from __future__ import annotations

import math
from typing import Annotated

from merge.methods.core.measure import Derived, Tiles, inner_products
from merge.methods.core.schema import Operands, PerModel, Range, Tensor, each, method


def norms(tiles: Tiles, *, normalize: bool, **_: object) -> list[float]:
    """The L2 norm of each statistic, for all of a tensor; ones unless they are asked for."""
    count = tiles.count // 2
    if not normalize:
        return [1.0] * count
    statistics = Derived(tiles, lambda _, operands: operands[count:], count)
    gram = inner_products(statistics)
    return [math.sqrt(gram[i][i]) or 1.0 for i in range(count)]


@method(space="weight", measure=norms)
def fisher(
    models: Operands,
    statistics: Operands,
    *,
    weight: Annotated[PerModel[float], Range(0.0, open_low=True)] = each(1.0),
    floor: Annotated[float, Range(0.0, open_low=True)] = 1e-6,
    normalize: bool = False,
    measured: list[float],
) -> Tensor:
    """The mean of the models, each weight of each counting as much as its Fisher information.

    weight: one number a model, above 0. floor: the least information that a weight is given, above
    0, after normalising. normalize: divide each tensor's information by its L2 norm.
    """
    import torch

    origin = models[0]  # sums of differences to it: fine-tunes lie close together
    total, shares = torch.zeros_like(origin), torch.zeros_like(origin)
    for model, known, w, norm in zip(models, statistics, weight, measured, strict=True):
        share = (known / norm).clamp_(min=floor).mul_(w)
        total.addcmul_(model - origin, share)
        shares += share
    return total.div_(shares).add_(origin)
