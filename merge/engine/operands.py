"""What the evaluation of a node may ask for: its operands' values, and buffers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from merge.ir.expr import Expr

__all__ = ["Operands"]


class Operands(Protocol):
    """What a node is computed from: the evaluator of its tensor."""

    def take(self, numel: int) -> Tensor:
        """A buffer in the compute type."""

    def value(self, expr: Expr, start: int, stop: int) -> Tensor:
        """Elements of an expression in the compute type."""

    def into(self, expr: Expr, start: int, stop: int, out: Tensor) -> None:
        """Copy elements of an expression into ``out``, holding nothing afterwards."""

    def whole(self, expr: Expr) -> Tensor:
        """All of an expression in its shape: floats in the compute type, others as stored."""

    def held(self, expr: Expr) -> Tensor:
        """The same for a small tensor, which is kept as long as its result is worked on."""
