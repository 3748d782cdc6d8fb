"""Base and experts as lazy checkpoints, read as differences a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merge import run
from merge.ir.checkpoint import Checkpoint, combine
from merge.ir.derived import LowRank
from merge.ir.expr import Expr, Linear, Read

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Stored", "value_of"]

_TILE = 1 << 20  # elements that are read at a time
_SMALL = 16 << 20  # bytes of a base tensor that is kept for the next expert


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Differences of experts to a base. wide: in float64, else in float32.

    experts: of one tree with the base, each with whether it is a difference already.
    """

    origin: Checkpoint
    experts: Sequence[tuple[Checkpoint, bool]]
    wide: bool = False
    device: str = "cpu"
    _known: dict[tuple[int, str], Expr] = field(default_factory=dict)
    _last: dict[str, Tensor] = field(default_factory=dict)  # a base tensor that is asked for again

    @property
    def count(self) -> int:
        return len(self.experts)

    def base(self, tensor: str) -> Tensor:
        """A tensor of the base."""
        return value_of(self.origin.tensors[tensor], tensor, self.wide).to(self.device)

    def delta(self, expert: int, tensor: str) -> Tensor:
        """An expert's difference to it."""
        expr, origin = self._difference(expert, tensor), self.origin.tensors[tensor]
        if isinstance(expr, Linear) and [c for c, _ in expr.terms] == [1.0, -1.0]:
            (_, own), (_, other) = expr.terms
            size = math.prod(origin.shape) * (8 if self.wide else 4)
            if other is origin and size <= _SMALL:
                if tensor not in self._last:
                    self._last.clear()
                    self._last[tensor] = value_of(origin, tensor, self.wide)
                value = value_of(own, tensor, self.wide).sub_(self._last[tensor])
                return value.to(self.device)
        return value_of(expr, tensor, self.wide).to(self.device)

    def _difference(self, expert: int, tensor: str) -> Expr:
        key = (expert, tensor)
        if key not in self._known:
            checkpoint, is_delta = self.experts[expert]
            own, base = checkpoint.tensors[tensor], self.origin.tensors[tensor]
            self._known[key] = own if is_delta else combine(tensor, [(1.0, own), (-1.0, base)])
        return self._known[key]

    def factors(self, expert: int, tensor: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same as (m, r), (r,), (n, r) where that is how it is stored: an adapter's."""
        import torch

        expr = self._difference(expert, tensor)
        if isinstance(expr, LowRank):
            expr = Linear(((1.0, expr),))
        if not isinstance(expr, Linear) or len(expr.terms) != 1:
            return None
        ((scale, product),) = expr.terms
        if not isinstance(product, LowRank):
            return None
        left, right = (value_of(e, tensor, self.wide) for e in product.operands)
        left, right = left.reshape(-1, product.rank), right.reshape(product.rank, -1).T
        if product.transposed:
            left, right = right, left
        s = torch.full((product.rank,), scale, dtype=left.dtype)
        return left.to(self.device), s.to(self.device), right.to(self.device)


def value_of(expr: Expr, name: str, wide: bool = False) -> Tensor:
    """The value of an expression in float32, or in float64 where it is ``wide``.

    A sum of stored tensors is read straight; anything else goes through the engine.
    """
    terms: Sequence[tuple[float, Expr]] = ((1.0, expr),)
    if isinstance(expr, Linear):
        terms = expr.terms
    if all(isinstance(e, Read) and e.dtype.kind == "float" for _, e in terms):
        return _sum(terms, expr.shape, wide)  # type: ignore[arg-type]
    alone = Checkpoint({name: expr}, name).cast("float64" if wide else "float32")
    return run.state_dict(alone)[name]


def _sum(terms: Sequence[tuple[float, Read]], shape: tuple[int, ...], wide: bool) -> Tensor:
    import torch

    kind = torch.float64 if wide else torch.float32
    out = torch.empty(math.prod(shape), dtype=kind)
    for number, (coefficient, read) in enumerate(terms):
        _add(out, read, coefficient, first=number == 0)
    return out.view(shape)


def _add(out: Tensor, read: Read, coefficient: float, *, first: bool) -> None:
    import torch

    from merge.engine.stage import bytes_of, torch_dtype

    stored = torch_dtype(read.dtype)
    size = read.dtype.itemsize
    with read.source.open(read.spec.name) as reader:
        if first and stored == out.dtype:
            reader.read_into(0, bytes_of(out))
            if coefficient != 1.0:
                out.mul_(coefficient)
            return
        buffer: torch.Tensor = torch.empty(min(_TILE, len(out)), dtype=stored)
        for at in range(0, len(out), _TILE):
            part = out[at : at + _TILE]
            piece = buffer[: len(part)]
            reader.read_into(at * size, bytes_of(piece))
            if first:
                part.copy_(piece)
                if coefficient != 1.0:
                    part.mul_(coefficient)
            else:
                part.add_(piece.to(out.dtype), alpha=coefficient)
