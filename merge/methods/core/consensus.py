"""Task vectors to one: drop, rescale, elect signs, sum. For the TIES and DARE families and kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from merge.methods.core.measure import Draw, Tiles, blocks
from merge.methods.core.schema import Operands, Tensor

__all__ = [
    "agreeing",
    "drop_at_random",
    "elect",
    "elected",
    "l1_ratios",
    "restoring_factors",
    "summed",
]

Thin = Callable[[int, int, Tensor], Tensor]
"""From an operand's number, a tile's start and the tile to the tile with some elements zeroed."""

_TINY = 1e-7  # below this an L1 norm is taken for zero and nothing is rescaled


def summed(
    deltas: Operands,
    weight: Sequence[float],
    factors: Sequence[float],
    *,
    normalize: bool,
    scale: float,
) -> Tensor:
    """scale * sum_i w_i f_i d_i, divided by sum_i w_i if ``normalize`` (unless that is 0)."""
    divisor = sum(weight)
    if normalize and abs(divisor) >= 1e-8:
        scale /= divisor
    coefficients = [scale * w * f for w, f in zip(weight, factors, strict=True)]
    total = deltas[0] * coefficients[0]
    for delta, coefficient in zip(deltas[1:], coefficients[1:], strict=True):
        total.add_(delta, alpha=coefficient)
    return total


def elected(
    deltas: Operands, weight: Sequence[float], factors: Sequence[float], *, normalize: bool
) -> Tensor:
    """The sum over those entries v_i = w_i f_i d_i whose sign is the elected one.

    s = +1 where sum_i v_i >= 0, else -1; m_i = [sign(v_i) = s]; zero never agrees.
    Out: sum_i v_i m_i, divided elementwise by sum_i w_i m_i if ``normalize`` (where that is 0, by
    1). The products are rounded before they are added, so an exact cancellation elects +1 on any
    machine.
    """
    values = [d * (w * f) for d, w, f in zip(deltas, weight, factors, strict=True)]
    return agreeing(values, elect(values), weight, normalize=normalize)


def elect(values: Operands) -> Tensor:
    """The sign of the sum, elementwise: +1 where it is 0 or more, else -1."""
    import torch

    votes = values[0].clone()
    for value in values[1:]:
        votes.add_(value)
    return torch.ge(votes, 0.0, out=votes).mul_(2.0).sub_(1.0)


def agreeing(values: Operands, sign: Tensor, weight: Sequence[float], *, normalize: bool) -> Tensor:
    """The sum over the entries of ``values`` that have the ``sign``, normalised as in `elected`.

    ``values`` are used up.
    """
    import torch

    total, divisor, agrees = (torch.zeros_like(sign) for _ in range(3))
    for value, w in zip(values, weight, strict=True):
        value.mul_(sign).clamp_(min=0.0)  # |v| where the sign agrees, else 0
        total.add_(value)
        if normalize:
            torch.gt(value, 0.0, out=agrees)
            divisor.add_(agrees, alpha=w)
    total.mul_(sign)
    if normalize:
        torch.eq(divisor, 0.0, out=agrees)
        total.div_(divisor.add_(agrees))
    return total


def drop_at_random(
    deltas: Operands, density: Sequence[float], *, start: int, draw: Draw
) -> list[Tensor]:
    """Each delta with elements kept with probability ``density[i]``, else 0."""
    return [
        d if p >= 1.0 else draw.keep(i, start, d, p).mul_(d)
        for i, (d, p) in enumerate(zip(deltas, density, strict=True))
    ]


def restoring_factors(
    tiles: Tiles, *, density: Sequence[float], rescale: bool = True, **_: object
) -> list[float]:
    """The measuring pass of DARE: what restores each operand's L1 norm after its random drop."""
    random = [i for i in range(tiles.count) if density[i] < 1.0]
    return l1_ratios(
        tiles,
        random if rescale else [],
        lambda i, start, x: tiles.draw.keep(i, start, x, density[i]).mul_(x),
    )


def l1_ratios(tiles: Tiles, thinned: Sequence[int], thin: Thin) -> list[float]:
    """f_i = sum|d_i| / sum|thin(d_i)| for the operands ``thinned``; without them no walk.

    1 for all others and where either sum is below 1e-7.
    """
    before, after = [0.0] * tiles.count, [0.0] * tiles.count
    for start, operands in tiles() if thinned else ():
        for i in thinned:
            magnitude = operands[i].abs()
            left = thin(i, start, magnitude)
            for whole, kept in zip(blocks(magnitude), blocks(left), strict=True):
                before[i] += float(whole.sum())
                after[i] += float(kept.sum())  # not a dot product, whose error is ten times it
    return [b / a if b >= _TINY and a >= _TINY else 1.0 for b, a in zip(before, after, strict=True)]
