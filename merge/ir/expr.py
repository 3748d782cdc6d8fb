"""Expressions: what one output tensor is, as data over input tensors.

``Read`` takes a tensor as stored; ``Linear`` is a weighted sum; ``Apply`` is a merge method;
``Same`` is for data that is not arithmetic (integers, flags): every operand must be equal. The
nodes of `merge.ir.derived` make tensors of stored ones before they are merged. Nothing here
touches a file or imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from merge.ir.derived import Derived
from merge.ir.dtypes import DType, promote
from merge.ir.spec import TensorSpec

__all__ = [
    "Apply",
    "Distant",
    "Expr",
    "InputFile",
    "Linear",
    "Location",
    "MethodLike",
    "Parameter",
    "Read",
    "Same",
    "Source",
    "Span",
    "TensorReader",
    "linear_sum",
    "reads",
    "walk",
]

Parameter = float | int | bool | str | None | tuple[float | int | bool | str | None, ...]


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """Where a tensor's bytes begin, for reading in disk order. ``file`` is '' in memory."""

    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file as it was when it was opened; a later change is an error."""

    path: str
    size: int
    mtime_ns: int  # 0 for a file that cannot change, such as one of a commit
    sha256: str | None = None  # where it is known without reading the file


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``begin`` to ``end`` of a file."""

    file: str
    begin: int
    end: int


class TensorReader(Protocol):
    """One tensor, open for reading."""

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the tensor's bytes from byte ``start`` on."""


@runtime_checkable
class Source(Protocol):
    """Where tensors come from. Equal sources hold the same bytes."""

    @property
    def identity(self) -> str:
        """What the source is, in words: a real path, or a name for weights in memory."""

    @property
    def files(self) -> tuple[InputFile, ...]:
        """The files behind it; empty for weights in memory."""

    def location(self, name: str) -> Location:
        """Where the tensor ``name`` lies."""

    def open(self, name: str) -> AbstractContextManager[TensorReader]:
        """Open one tensor; raises SourceError when the file has changed."""


@runtime_checkable
class Distant(Source, Protocol):
    """A source whose bytes are far away: they are asked for seldom, and many at a time."""

    def span(self, name: str) -> Span | None:
        """Where a tensor lies in one piece, far away; None for one that is near."""

    def fetch(self, file: str, begin: int, view: memoryview) -> None:
        """Fill ``view`` with a file's bytes from ``begin`` on."""

    def head(self, file: str) -> bytes | None:
        """What stands in the file before its first tensor, if that is still known."""


class MethodLike(Protocol):
    """What an expression knows of a merge method; `merge.methods` has the real ones."""

    @property
    def name(self) -> str: ...

    @property
    def space(self) -> str:
        """``weight``, ``delta`` or ``either``: what the operands and the result are."""

    @property
    def base(self) -> str:
        """What a base model is to the method: required, optional, first operand, donor."""

    @property
    def local(self) -> str:
        """``element``, ``row`` or ``tensor``: the least tile that the function can work on."""

    @property
    def coefficients(self) -> bool:
        """Whether the function returns coefficients of a linear combination, not a tensor."""

    @property
    def statistics(self) -> bool:
        """Whether the function also takes a statistic of each model."""

    @property
    def statistic(self) -> Callable[[tuple[int, ...], tuple[int, ...]], None] | None:
        """For statistics in shapes of their own: checks one's shape against its weight's."""

    @property
    def unknown(self) -> MethodLike:
        """What computes a tensor that no model has a statistic of."""

    @property
    def measure(self) -> Callable[..., Any] | None:
        """The measuring pass, if there is one."""

    @property
    def scratch(self) -> Callable[[tuple[int, ...], int], int] | None:
        """What the function holds besides its operands, for a tensor of a shape."""

    @property
    def walks(self) -> int:
        """How often the measuring pass goes over the whole tensor."""

    @property
    def function(self) -> Callable[..., Any]:
        """The method itself."""

    @property
    def injected(self) -> frozenset[str]:
        """Which of the engine's keywords the function takes."""

    @property
    def takes(self) -> frozenset[str]:
        """The arguments of the function that come from a recipe's parameters."""

    def variant(
        self, shape: tuple[int, ...], arguments: Mapping[str, Any], vocabulary: bool | None = None
    ) -> MethodLike:
        """What computes a tensor of this shape with these arguments."""

    def check_inputs(self, count: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor as stored in a source."""

    source: Source
    spec: TensorSpec

    @property
    def dtype(self) -> DType:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def operands(self) -> tuple[Expr, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Linear:
    """The sum of coefficient times operand, in the order given."""

    terms: tuple[tuple[float, Expr], ...]

    @property
    def operands(self) -> tuple[Expr, ...]:
        return tuple(e for _, e in self.terms)

    @property
    def dtype(self) -> DType:
        return promote(*(e.dtype for e in self.operands))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0][1].shape


@dataclass(frozen=True, slots=True)
class Apply:
    """A merge method over operands of one shape, with its parameters for this tensor.

    The first ``models`` operands are models (or deltas), the others a statistic of each of them,
    which may have a shape of its own.
    ``parameters`` is sorted by name; a per-model parameter is a tuple, one value an operand.
    ``tensor`` names the output tensor: random methods draw by (seed, method, operand, tensor).
    """

    method: MethodLike
    operands: tuple[Expr, ...]
    parameters: tuple[tuple[str, Parameter], ...]
    tensor: str
    seed: int
    models: int

    @property
    def dtype(self) -> DType:
        return promote(*(e.dtype for e in self.operands[: self.models]))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.operands[0].shape

    @property
    def arguments(self) -> Mapping[str, Parameter]:
        return dict(self.parameters)


@dataclass(frozen=True, slots=True)
class Same:
    """Data that is not arithmetic: all operands hold equal bytes, the first is copied."""

    operands: tuple[Expr, ...]

    @property
    def dtype(self) -> DType:
        return self.operands[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.operands[0].shape


Expr = Read | Linear | Apply | Same | Derived


def linear_sum(terms: Iterable[tuple[float, Expr]]) -> Expr:
    """The sum of coefficient times operand as one expression, sums among the operands dissolved.

    Coefficients of equal operands are added exactly; terms of coefficient 0 go, and with them the
    reading of their tensors; a lone operand with coefficient 1 is that operand.
    """
    parts: dict[Expr, list[float]] = {}
    for coefficient, operand in terms:
        if isinstance(operand, Linear):
            for inner, leaf in operand.terms:
                parts.setdefault(leaf, []).append(coefficient * inner)
        else:
            parts.setdefault(operand, []).append(coefficient)
    summed = [(math.fsum(cs), leaf) for leaf, cs in parts.items()]
    kept = [(c, leaf) for c, leaf in summed if c != 0.0]
    if not kept:  # everything cancelled: zeros of the right shape
        kept = [(0.0, summed[0][1])]
    if len(kept) == 1 and kept[0][0] == 1.0:
        return kept[0][1]
    return Linear(tuple(kept))


def walk(expr: Expr) -> Iterator[Expr]:
    """Every node once, operands before the node that uses them (so `Apply` inside out)."""
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(expr, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(node.operands))


def reads(expr: Expr) -> tuple[Read, ...]:
    """The distinct tensors that ``expr`` reads, in order of first use."""
    return tuple(dict.fromkeys(n for n in walk(expr) if isinstance(n, Read)))
