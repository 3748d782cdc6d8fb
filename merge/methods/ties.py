"""TIES: trim, elect sign, merge what agrees (Yadav et al. 2023, arXiv:2306.01708).

    d_i = W_i - B, trimmed to its int(density_i * N) largest magnitudes
    v_i = w_i d_i
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

from merge.methods.core.consensus import elected
from merge.methods.core.measure import Tiles
from merge.methods.core.schema import Operands, PerModel, Range, Tensor, each, method
from merge.methods.core.trim import Trim, kept_count, largest, trim


def thresholds(tiles: Tiles, *, density: Sequence[float], **_: object) -> list[Trim]:
    """Where each task vector is cut."""
    return largest(tiles, [(i, kept_count(d, tiles.numel)) for i, d in enumerate(density)])


@method(space="delta", measure=thresholds, idempotent=False)
def ties(
    deltas: Operands,
    *,
    weight: PerModel[float],
    density: Annotated[PerModel[float], Range(0.0, 1.0)] = each(1.0),
    normalize: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    measured: list[Trim],
    start: int,
) -> Tensor:
    """The base plus the agreeing part of the trimmed differences to it.

    weight: one number a model. density: kept fraction of each task vector, in [0, 1]. normalize:
    average instead of sum. lambda: scales the result. int8_mask: accepted, changes nothing.
    """
    trimmed = [trim(d, kept, start) for d, kept in zip(deltas, measured, strict=True)]
    return elected(trimmed, weight, [1.0] * len(deltas), normalize=normalize).mul_(lambda_)
