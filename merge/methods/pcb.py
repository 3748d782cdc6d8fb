"""PCB-Merging: parameters compete within and between tasks (Du et al. 2024, arXiv:2410.02396).

    d_i = W_i - B
    a_i = (|d_i| - min |d_i|) / (max |d_i| - min |d_i|)             0 where max = min
    s_i = exp(N a_i^2) * tanh(d_i * sum_j d_j)                      intra times inter balancing
    c_i = the int(density * numel)-th largest s_i, at least the first
    b_i = max((s_i - c_i) / (max s_i - c_i), 0)                     [s_i = c_i] where max = c_i
    out = B + lambda * sum_i b_i d_i / sum_i b_i                    B where all b_i are 0

The softmax of the paper is an exponential here, as in the authors' code: its divisor cancels in
b_i. Their code works on a whole model as one vector; here minimum, maximum and rank are those of
each tensor, so every tensor keeps the same fraction. It also clips the outermost 0.01 % of |d_i|,
which is left out. Its settings are a density of 0.05 or 0.1 and a lambda around 1.2, tuned by task.

Recipe::

    merge_method: pcb
    base_model: base
    models:
      - model: a
      - model: b
    parameters: {density: 0.1, lambda: 1.2}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from merge.methods.core.measure import Derived, Tiles
from merge.methods.core.order import Extent, extents, kth_largest
from merge.methods.core.schema import Operands, Range, Tensor, method
from merge.methods.core.trim import kept_count


@dataclass(frozen=True, slots=True)
class Contest:
    """One model's magnitudes, and its scores from which (0) and up to which (1) it counts."""

    magnitudes: Extent
    cut: float
    top: float


def contests(tiles: Tiles, *, density: float, **_: object) -> list[Contest]:
    """Extents of the magnitudes, then of the scores, then the ranked scores: four walks."""
    n = tiles.count
    magnitudes = extents(Derived(tiles, lambda _, deltas: [d.abs() for d in deltas], n))
    scored = Derived(tiles, lambda _, deltas: scores(deltas, magnitudes), n)
    found = extents(scored)
    cuts = kth_largest(scored, kept_count(density, tiles.numel), found)
    return [Contest(m, c, s.high) for m, c, s in zip(magnitudes, cuts, found, strict=True)]


@method(space="delta", measure=contests, walks=4, idempotent=False)
def pcb(
    deltas: Operands,
    *,
    density: Annotated[float, Range(0.0, 1.0, open_low=True)] = 0.1,
    lambda_: float = 1.0,
    measured: list[Contest],
) -> Tensor:
    """The base plus the mean of the differences to it, weighted by how well each element competes.

    density: fraction of each tensor that competes at all, in (0, 1]; the last of it has weight 0.
    lambda: scales the result.
    """
    import torch

    total, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    scored = scores(deltas, [m.magnitudes for m in measured])
    for delta, score, contest in zip(deltas, scored, measured, strict=True):
        weight = _weight(score, contest)
        total.addcmul_(weight, delta)
        divisor += weight
    divisor += divisor == 0.0
    return total.div_(divisor).mul_(lambda_)


def scores(deltas: Operands, magnitudes: Sequence[Extent]) -> list[Tensor]:
    """s_i over exp(N), which cancels in the end: so that many models do not overflow."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    out = []
    for delta, extent in zip(deltas, magnitudes, strict=True):
        width = extent.high - extent.low or 1.0
        intra = delta.abs().sub_(extent.low).div_(width).square_()
        intra.sub_(1.0).mul_(len(deltas)).exp_()
        out.append(intra.mul_((delta * total).tanh_()))
    return out


def _weight(score: Tensor, contest: Contest) -> Tensor:
    """b_i."""
    width = contest.top - contest.cut
    if width > 0.0:
        return (score - contest.cut).div_(width).clamp_(min=0.0)
    return (score >= contest.cut).to(score.dtype)
