"""Parts of tensors while coefficients are learned: kept in memory, or made anew for each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from merge.errors import RecipeError
from merge.learning.parts import Dense, Factored, Part, quantised
from merge.learning.prepare import Preparation, Prepared
from merge.methods.core.shapes import not_a_matrix
from merge.methods.core.spectral import thin_svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MEMORY", "Differences", "InMemory", "Store"]

MEMORY = ("resident", "stream", "int8", "lowrank")
"""How parts are kept; ``lowrank`` is followed by a rank: ``lowrank:64``."""


class Differences(Protocol):
    """Where a base and the differences of experts to it are read, a whole tensor at a time."""

    @property
    def count(self) -> int:
        """Experts."""

    def base(self, tensor: str) -> Tensor:
        """A tensor of the base, in the type of the arithmetic; the caller may write to it."""

    def delta(self, expert: int, tensor: str) -> Tensor:
        """An expert's difference to it, likewise."""

    def factors(self, expert: int, tensor: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same as (m, r), (r,), (n, r) where that is how it is stored: an adapter's."""


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """Differences of state dicts, for tests and small models."""

    origin: Mapping[str, Tensor]
    experts: Sequence[Mapping[str, Tensor]]

    @property
    def count(self) -> int:
        return len(self.experts)

    def base(self, tensor: str) -> Tensor:
        return self.origin[tensor].clone()

    def delta(self, expert: int, tensor: str) -> Tensor:
        return self.experts[expert][tensor] - self.origin[tensor]

    def factors(self, expert: int, tensor: str) -> tuple[Tensor, Tensor, Tensor] | None:
        return None


class Store:
    """The parts of each tensor in the order of its operands.

    memory: ``resident`` keeps all, ``stream`` none but those in singular directions (which are
    thin, and take a decomposition to make), ``int8`` keeps dense ones in bytes, ``lowrank:r`` keeps
    r singular directions of matrices, and all else but vectors in bytes. learns_base: the base
    itself is the last operand. empty: tensors that no expert has moved.
    """

    def __init__(
        self,
        source: Differences,
        prepare: Preparation,
        memory: str = "resident",
        *,
        learns_base: bool = False,
        vocabularies: frozenset[str] | None = None,
        empty: frozenset[str] = frozenset(),
    ) -> None:
        self.source = source
        self.prepare = prepare
        self.mode, self.rank = _mode(memory)
        self.learns_base = learns_base
        self.vocabularies = vocabularies
        self.empty = empty
        self.read_bytes = 0
        self._kept: dict[str, Prepared] = {}

    def vocabulary(self, tensor: str) -> bool | None:
        """Whether a tensor's rows are tokens; None where nobody knows."""
        return None if self.vocabularies is None else tensor in self.vocabularies

    def exact(self) -> Store:
        """A store of the same parts as they are: itself, unless it keeps them rounded."""
        if self.mode in ("resident", "stream"):
            return self
        return Store(
            self.source,
            self.prepare,
            "stream",
            learns_base=self.learns_base,
            vocabularies=self.vocabularies,
            empty=self.empty,
        )

    def origin(self, tensor: str) -> Tensor:
        """What the parts are added to."""
        import torch

        base = self.source.base(tensor)
        if self.prepare.which == "cart":
            shift = self._prepared(tensor).origin
            assert shift is not None
            base += shift
        return torch.zeros_like(base) if self.learns_base else base

    def parts(self, tensor: str) -> Iterator[Part]:
        """The part of each operand, one after another."""
        if self.keeps(tensor) or self.prepare.joint:
            yield from self._prepared(tensor).parts
        else:
            for i in range(self.source.count):
                yield self._one(i, tensor)
        if self.learns_base:
            yield Dense(self.source.base(tensor), tensor, self.prepare.seed)

    def keeps(self, tensor: str) -> bool:
        """Whether a tensor's parts stay in memory, or are already there."""
        return self.mode != "stream" or tensor in self._kept

    def _prepared(self, tensor: str) -> Prepared:
        if (known := self._kept.get(tensor)) is not None:
            return known
        if self.prepare.joint:
            deltas = [self.source.delta(i, tensor) for i in range(self.source.count)]
            self.read_bytes += sum(d.nbytes for d in deltas)
            made = self.prepare(tensor, deltas, self.vocabulary(tensor))
        else:
            parts = (self._smaller(self._one(i, tensor)) for i in range(self.source.count))
            made = Prepared(tuple(parts))
        thin = all(isinstance(p, Factored) for p in made.parts)
        if self.mode != "stream" or thin:
            made = Prepared(tuple(self._smaller(p) for p in made.parts), made.origin)
            self._kept[tensor] = made
        return made

    def _one(self, expert: int, tensor: str) -> Part:
        """The part of one expert, where it does not depend on the others."""
        if self.prepare.which == "none":
            found = self.source.factors(expert, tensor)
            if found is not None:
                return Factored(*found, tensor, self.prepare.seed)
        delta = self.source.delta(expert, tensor)
        self.read_bytes += delta.nbytes
        return self.prepare.one(expert, tensor, delta)

    def _smaller(self, part: Part) -> Part:
        """The part as it is kept."""
        if not isinstance(part, Dense):
            return part
        if self.mode == "int8":
            return quantised(part)
        shape = tuple(part.value.shape)
        if self.mode == "lowrank" and len(shape) > 1:
            if not_a_matrix(shape, {}, self.vocabulary(part.tensor)):
                return quantised(part)
            return Factored(*thin_svd(part.value, self.rank), part.tensor, part.seed)
        return part


def _mode(text: str) -> tuple[str, int]:
    mode, _, rank = text.partition(":")
    wrong = mode not in MEMORY or (bool(rank) and (mode != "lowrank" or not rank.isdecimal()))
    if wrong or rank == "0":
        raise RecipeError(
            "there is no such way to keep differences",
            key="memory",
            found=text,
            expected=f"one of {', '.join(MEMORY)}, or lowrank:64",
        )
    return mode, int(rank or 64)
