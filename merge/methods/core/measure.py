"""Measuring passes: what a method must know of a whole tensor before it computes one tile of it.

A measure is a plain function ``measure(tiles, **parameters)``. Calling ``tiles`` walks over the
tensor once more, in order; the engine reads, converts and reuses buffers behind it. Sums run over
fixed blocks of `BLOCK` elements and are added in float64 in order, so that a result does not depend
on the tile size, the number of threads or the memory budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from merge.methods.core.schema import Operands, Tensor

__all__ = ["BLOCK", "Derived", "Draw", "Gram", "Tiles", "blocks", "inner_products"]

BLOCK = 1 << 16
"""Elements of one summand; every tile but the last is a whole number of blocks."""

Gram = Sequence[Sequence[float]]


class Draw(Protocol):
    """Random bits by counter: `merge.methods.core.masks.Stream` is the real one."""

    def keep(self, operand: int, start: int, like: Tensor, probability: float) -> Tensor:
        """1.0 with ``probability`` and else 0.0, for elements ``start``... of an operand."""

    def keep_each(self, operand: int, start: int, probability: Tensor) -> Tensor:
        """The same where each element has its own probability."""


class Tiles(Protocol):
    """One tensor's operands, tile by tile, as often as a measure asks."""

    @property
    def numel(self) -> int:
        """Elements of the tensor."""

    @property
    def count(self) -> int:
        """Number of operands."""

    @property
    def grain(self) -> int:
        """Spans begin and end at multiples of this: a row's length, where rows are needed."""

    @property
    def allowance(self) -> int:
        """Bytes that the measure may hold between tiles."""

    @property
    def draw(self) -> Draw:
        """The random bits of this tensor."""

    def __call__(
        self, spans: Iterable[tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, Operands]]:
        """(start, operands) for each tile, or for each (start, stop) in ``spans``.

        The operands are valid until the next step; copy what must be kept.
        """


class Derived:
    """Other values of a tensor's shape, computed tile by tile from its operands, as `Tiles`.

    function: from a tile's start and its operands to its derived values, `count` of them.
    """

    def __init__(
        self, tiles: Tiles, function: Callable[[int, Operands], Sequence[Tensor]], count: int = 1
    ) -> None:
        self.numel, self.grain, self.count = tiles.numel, tiles.grain, count
        self.allowance, self.draw = tiles.allowance, tiles.draw
        self._tiles, self._function = tiles, function

    def __call__(
        self, spans: Iterable[tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, Operands]]:
        for start, operands in self._tiles(spans):
            yield start, self._function(start, operands)


def blocks(tile: Tensor) -> Sequence[Tensor]:
    """``tile`` cut into the fixed summands."""
    flat = tile.reshape(-1)
    return [flat[at : at + BLOCK] for at in range(0, flat.numel(), BLOCK)]


def inner_products(tiles: Tiles, **_parameters: object) -> Gram:
    """The matrix of inner products of the operands, (n, n), in float64.

    G_ij = sum over elements of x_i x_j.
    """
    n = tiles.count
    gram = [[0.0] * n for _ in range(n)]
    for _, operands in tiles():
        parts = [blocks(x) for x in operands]
        for i in range(n):
            for j in range(i, n):
                for a, b in zip(parts[i], parts[j], strict=True):
                    gram[i][j] += float(a.dot(b))
    for i in range(n):
        for j in range(i):
            gram[i][j] = gram[j][i]
    return gram
