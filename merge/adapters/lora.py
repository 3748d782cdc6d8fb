"""What LoRA makes of one weight: W + s B A, with a given norm for DoRA.

LoRA: Hu et al. 2021. DoRA: Liu et al. 2024, W' = m (W + s B A) / ||W + s B A||, the norm of what
one output unit reads. A is (r, in) and B (out, r); of an embedding B A is the transpose of what is
added, and of a convolution the kernel's axes belong to ``in``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from merge.ir.derived import LowRank, Whole, cast, concat, window
from merge.ir.expr import Expr, linear_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["factors_of", "is_turned", "with_bias", "with_factors"]

Factors = tuple[Expr, Expr]
"""B and A."""

_PART = 1 << 18
"""Elements of the output units whose norms are taken at a time."""


def factors_of(tensors: Mapping[str, Expr]) -> Factors | None:
    """B and A of one module, or None where one is missing."""
    for left, right in (("lora_B", "lora_A"), ("lora_embedding_B", "lora_embedding_A")):
        if left in tensors and right in tensors:
            return tensors[left], tensors[right]
    return None


def is_turned(shape: tuple[int, ...], factors: Factors, either: bool) -> bool | None:
    """Whether a weight of this shape is stored as the transpose of B A; None where neither fits.

    either: the answer for a square one, whose shape does not tell.
    """
    left, right = factors
    if left.shape[1] != right.shape[0]:
        return None
    straight = (left.shape[0], *right.shape[1:])
    turned = straight[::-1] if len(straight) == 2 else None
    if shape == straight == turned:
        return either
    if shape == straight:
        return False
    return True if shape == turned else None


def with_factors(
    weight: Expr, factors: Factors, scale: float, turned: bool, magnitude: Expr | None = None
) -> Expr:
    """The weight with LoRA, or with DoRA where there is a magnitude; stored as the weight is."""
    left, right = factors
    if magnitude is None:
        product = LowRank(factors, right.shape[0], turned, weight.shape, weight.dtype)
        return linear_sum([(1.0, weight), (scale, product)])
    if turned:
        return _decomposed(weight, factors, scale, turned, magnitude)
    count = _units(weight.shape)
    parts = [
        _decomposed(
            _rows(weight, weight.shape, first, count),
            (_rows(left, left.shape, first, count), right),
            scale,
            turned,
            _rows(magnitude, weight.shape[:1], first, count),
        )
        for first in range(0, weight.shape[0], count)
    ]
    return concat(parts, weight.shape)


def _decomposed(
    weight: Expr, factors: Factors, scale: float, turned: bool, magnitude: Expr
) -> Expr:
    operands = (weight, *factors, magnitude)
    parameters = (("scale", scale), ("turned", turned))
    scratch = 2 * math.prod(weight.shape)
    return Whole("dora", _dora, operands, parameters, weight.shape, weight.dtype, scratch)


def _units(shape: tuple[int, ...]) -> int:
    """Output units that are computed at a time: the most that divide all into equal parts."""
    units = shape[0]
    most = max(1, _PART * units // max(1, math.prod(shape)))
    return max((n for n in range(1, min(most, units) + 1) if units % n == 0), default=1)


def _rows(expr: Expr, shape: tuple[int, ...], first: int, count: int) -> Expr:
    """The rows from ``first`` on of an expression seen as ``shape``."""
    return window(expr, first * math.prod(shape[1:]), (count, *shape[1:]))


def with_bias(bias: Expr, change: Expr, scale: float) -> Expr:
    """b + s times the bias of B."""
    return linear_sum([(1.0, bias), (scale, cast(change, bias.dtype))])


def _dora(
    weight: Tensor, left: Tensor, right: Tensor, magnitude: Tensor, *, scale: float, turned: bool
) -> Tensor:
    import torch

    rows = weight.T if turned else weight.reshape(weight.shape[0], -1)
    changed = torch.addmm(rows, left.reshape(len(rows), -1), right.reshape(len(right), -1),
                          alpha=scale)  # fmt: skip
    changed *= (magnitude.reshape(-1) / torch.linalg.vector_norm(changed, dim=1))[:, None]
    return (changed.T if turned else changed).reshape(weight.shape)
