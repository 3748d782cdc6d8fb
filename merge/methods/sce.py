"""SCE: select by variance, calculate weights, erase minorities (Wan et al. 2024, arXiv:2408.07990).

    d_i = W_i - B
    u = variance of d_1 ... d_n at each position
    k = int(select_topk * number of positions where u > 0)
    d_i <- d_i at the k positions of largest u, else 0      all are kept where select_topk is 1
    w_i = sum d_i^2 / sum_j sum d_j^2                       1 / n if all are zero
    s = +1 where sum_i d_i >= 0, else -1;   m_i = [sign(d_i) = s]
    out = B + sum_i w_i d_i m_i / sum_i w_i m_i             B where none agrees

Sums without an index run over the tensor. Among equal variances the first in memory order are kept.

mergekit takes uniform weights wherever the mean squares sum to less than 1e-6. Those of fine-tunes
nearly always do, so that their weights are never calculated: two models whose differences are
5e-4 and 1e-4 in size get 0.5 each, where the formula says 0.96 and 0.04. It also divides by no less
than 1e-6, which shrinks what only a model of a smaller weight has to say. Here both are as in the
formula.

Recipe::

    merge_method: sce
    base_model: base
    models:
      - model: a
      - model: b
    parameters: {select_topk: 0.1}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from merge.methods.core.consensus import agreeing, elect
from merge.methods.core.measure import Derived, Tiles, blocks
from merge.methods.core.schema import Operands, Range, Tensor, method
from merge.methods.core.trim import Trim, largest, trim


@dataclass(frozen=True, slots=True)
class Fusion:
    """What a tensor's tiles have in common. cut: of the `spread`; None where all is selected."""

    cut: Trim | None
    weight: list[float]


def fusion(tiles: Tiles, *, select_topk: float, **_: object) -> Fusion:
    """Select the positions, then weigh the models by what they hold there."""
    cut = _cut(tiles, select_topk) if select_topk < 1.0 else None
    squares = [0.0] * tiles.count
    for start, deltas in tiles():
        for i, delta in enumerate(selected(deltas, cut, start)):
            for part in blocks(delta):
                squares[i] += float(part.square().sum())
    total = sum(squares)
    return Fusion(cut, [s / total if total else 1.0 / tiles.count for s in squares])


def _cut(tiles: Tiles, select_topk: float) -> Trim:
    import torch

    spreads = Derived(tiles, lambda _, deltas: [spread(deltas)])
    differing = sum(int(torch.count_nonzero(u)) for _, [u] in spreads())
    [cut] = largest(spreads, [(0, int(select_topk * differing))])
    return cut


def spread(deltas: Operands) -> Tensor:
    """n^2 times the population variance: n sum e_i^2 - (sum e_i)^2 with e_i = d_i - d_1.

    Exactly 0 where all are equal. As the e_i hold a zero, the difference is not below sum e_i^2,
    so little is lost to cancellation.
    """
    import torch

    total, squares = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas[1:]:
        difference = delta - deltas[0]
        total.add_(difference)
        squares.addcmul_(difference, difference)
    return squares.mul_(len(deltas)).sub_(total.square_())


def selected(deltas: Operands, cut: Trim | None, start: int) -> Iterator[Tensor]:
    """The deltas at the selected positions, else 0; one after another, to hold one at a time."""
    if cut is None:
        yield from deltas
    else:
        mask = trim(spread(deltas), cut, start).sign_()  # no selected spread is 0
        for delta in deltas:
            yield delta * mask


@method(space="delta", measure=fusion, walks=3)
def sce(
    deltas: Operands,
    *,
    select_topk: Annotated[float, Range(0.0, 1.0)] = 1.0,
    int8_mask: bool = False,
    measured: Fusion,
    start: int,
) -> Tensor:
    """The base plus the mean of what agrees where the models differ most, weighed by its size.

    select_topk: fraction of the positions where models differ that is merged, in [0, 1]; the base
    stays at the others. int8_mask: accepted, changes nothing.
    """
    chosen = selected(deltas, measured.cut, start)
    values = [d * w for d, w in zip(chosen, measured.weight, strict=True)]
    return agreeing(values, elect(deltas), measured.weight, normalize=True)
