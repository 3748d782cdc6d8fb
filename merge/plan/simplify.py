"""Simplify an expression without changing its value.

Chains of sums and products become one linear combination over distinct operands; coefficients of
equal operands are added exactly (`math.fsum`), so that thirds of one model add up to that model;
zero terms go, and with them the reading of their tensors; a lone operand with coefficient 1 becomes
that operand, which for a stored tensor means a byte copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from merge.ir.derived import Concat, Derived, Reorder, Window, concat, reorder, window
from merge.ir.expr import Apply, Expr, Linear, Read, Same, linear_sum, walk

__all__ = ["simplify"]


Node = Apply | Same | Derived


def simplify(expr: Expr, coefficients: Mapping[int, Sequence[float]] | None = None) -> Expr:
    """An equal expression in simplest form; equal reads in it are one object, as are equal orders.

    coefficients: of `Apply` nodes (by id) that have been measured and are linear combinations: they
    dissolve into the sum around them. What does not change stays the very same object.
    """
    known = coefficients or {}
    done: dict[int, Expr] = {}
    stored: dict[Expr, Expr] = {}
    for node in walk(expr):
        if isinstance(node, Linear):
            sum_ = linear_sum([(c, done[id(e)]) for c, e in node.terms])
            done[id(node)] = node if _identical(sum_, node) else sum_
        elif isinstance(node, Read):
            done[id(node)] = stored.setdefault(node, node)
        else:
            operands = tuple(done[id(e)] for e in node.operands)
            if id(node) in known:
                done[id(node)] = linear_sum(list(zip(known[id(node)], operands, strict=True)))
            else:
                made = _over(node, operands)
                moved = isinstance(made, Reorder)
                done[id(node)] = stored.setdefault(made, made) if moved else made
    return done[id(expr)]


def _over(node: Node, operands: tuple[Expr, ...]) -> Expr:
    """``node`` over operands equal to its own: the very same object where they are its own."""
    if isinstance(node, Same) and len(operands) == 1:
        return operands[0]
    if all(a is b for a, b in zip(operands, node.operands, strict=True)):
        return node
    if isinstance(node, Window):
        return window(operands[0], node.start, node.shape)
    if isinstance(node, Concat):
        return concat(operands, node.shape)
    if isinstance(node, Reorder):
        return reorder(operands[0], node.axes)
    return replace(node, operands=operands)  # type: ignore[arg-type]


def _identical(a: Expr, b: Linear) -> bool:
    """Whether two sums have the same coefficients over the very same operands."""
    return (
        isinstance(a, Linear)
        and len(a.terms) == len(b.terms)
        and all(c == d and x is y for (c, x), (d, y) in zip(a.terms, b.terms, strict=True))
    )
