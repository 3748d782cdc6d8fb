"""TIES: trim, elect sign, merge what agrees (Yadav et al. 2023, arXiv:2306.01708).

    d_i = W_i - B, trimmed to its int(density_i * N) largest magnitudes
    r_i = sum|W_i - B| / sum|d_i|           1 without rescale
    v_i = w_i r_i d_i
    s = +1 where sum_i v_i >= 0, else -1;   m_i = [sign(v_i) = s]
    out = B + lambda * sum_i v_i m_i        divided elementwise by sum_i w_i m_i if normalize

As in mergekit, weights enter the election and the divisor; the paper's disjoint mean is the case
of equal weights. Among equal magnitudes at the threshold the first in memory order are kept, so
exactly the stated number stays; at least one element stays for any density above 0.

Recipe::

    merge_method: ties
    base_model: base
    models:
      - model: a
        parameters: {weight: 1.0, density: 0.5}
      - model: b
        parameters: {weight: 1.0, density: 0.5}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from merge.methods.core.consensus import elected, l1_ratios
from merge.methods.core.measure import Tiles
from merge.methods.core.schema import Operands, PerModel, Range, Tensor, each, method
from merge.methods.core.trim import Trim, kept_count, largest, trim


def cuts(
    tiles: Tiles, *, density: Sequence[float], rescale: bool = False, **_: object
) -> tuple[list[Trim], list[float]]:
    """Where each task vector is cut, and what restores its L1 norm (1 without ``rescale``)."""
    kept = largest(tiles, [(i, kept_count(d, tiles.numel)) for i, d in enumerate(density)])
    trimmed = [i for i, d in enumerate(density) if rescale and d < 1.0]
    return kept, l1_ratios(tiles, trimmed, lambda i, start, x: trim(x, kept[i], start))


@method(space="delta", measure=cuts, idempotent=False)
def ties(
    deltas: Operands,
    *,
    weight: PerModel[float],
    density: Annotated[PerModel[float], Range(0.0, 1.0)] = each(1.0),
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    measured: tuple[list[Trim], list[float]],
    start: int,
) -> Tensor:
    """The base plus the agreeing part of the trimmed differences to it.

    weight: one number a model. density: kept fraction of each task vector, in [0, 1]. normalize:
    average instead of sum. rescale: restore each tensor's L1 norm after the trim. lambda: scales
    the result. int8_mask: accepted, changes nothing.
    """
    kept, factors = measured
    trimmed = [trim(d, k, start) for d, k in zip(deltas, kept, strict=True)]
    return elected(trimmed, weight, factors, normalize=normalize).mul_(lambda_)
