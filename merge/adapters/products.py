"""Differences of models that are sums of products of thin matrices, told by their expressions."""

from __future__ import annotations

from collections.abc import Sequence

from merge.ir.derived import LowRank
from merge.ir.expr import Expr, Linear, linear_sum

__all__ = ["difference_of", "products_of"]

_NOTHING = 1e-12
"""Coefficients below this are rounding errors of weights that were to add up to 1."""


def difference_of(model: Expr, base: Expr) -> Expr | None:
    """``model - base`` without terms of no weight; None where nothing is left of it.

    Terms of the base cancel, exactly or but for the rounding of coefficients, and are not read.
    """
    sum_ = linear_sum([(1.0, model), (-1.0, base)])
    if not isinstance(sum_, Linear):
        return sum_
    kept = [(c, e) for c, e in sum_.terms if abs(c) > _NOTHING]
    return linear_sum(kept) if kept else None


def products_of(expr: Expr) -> Sequence[tuple[float, LowRank]] | None:
    """The terms of a sum of products of thin matrices; None for anything else."""
    terms = expr.terms if isinstance(expr, Linear) else ((1.0, expr),)
    found = [(c, e) for c, e in terms if isinstance(e, LowRank)]
    return found if len(found) == len(terms) else None
