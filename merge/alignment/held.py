"""The tensors of two networks, read one after the other and held as long as their batch is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from merge.errors import SourceError
from merge.symmetry.action import apply
from merge.symmetry.axes import Axis, Factor, factors_of
from merge.symmetry.symmetry import Layout, Symmetry

if TYPE_CHECKING:
    from torch import Tensor

    from merge.symmetry.elements import Element

__all__ = ["Held", "Pair", "Reader"]

_RUN = 1 << 16  # elements of which an inner product is computed in the tensors' precision

_ROWS = 1 << 23
"""Elements of the rows of a tensor that is read piece by piece."""


class Reader(Protocol):
    """A network's tensors, one at a time."""

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """The tensor ``name``, or its rows from ``first`` on and before ``last``."""


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A tensor of both networks, or some rows of it."""

    symmetry: Symmetry  # of this tensor and those that it may change places with
    name: str
    a: Tensor
    others: Callable[[str], Tensor]  # the second network's tensors

    @property
    def layout(self) -> Layout:
        return self.symmetry.tensors[self.name]

    def aligned(self, element: Element) -> Tensor:
        """The second network's tensor after ``element``."""
        moving = {g: element[g] for g in self.layout.groups() if g in element}
        if not moving:
            return self.others(self.name)
        moved: Tensor = apply(self.symmetry, _Fetched(self.name, self.others), moving)[self.name]
        return moved

    def worth(self, element: Element) -> float:
        """Inner product of the first network's tensor with the second's after ``element``."""
        return product(self.a, self.aligned(element))


class _Fetched(Mapping[str, "Tensor"]):
    """One tensor, and any other when it is asked for."""

    def __init__(self, name: str, fetch: Callable[[str], Tensor]) -> None:
        self._name, self._fetch = name, fetch

    def __getitem__(self, name: str) -> Tensor:
        return self._fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter([self._name])

    def __len__(self) -> int:
        return 1


@dataclass(slots=True)
class Held:
    """Reads, counts and keeps. All tensors are kept from the first read on if they fit ``hold``."""

    symmetry: Symmetry
    a: Reader
    b: Reader
    names: Sequence[str]
    hold: int  # elements
    progress: Callable[[int], None] | None = None
    bytes_read: int = 0
    _kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def load(self, names: Sequence[str]) -> None:
        """Have these tensors in memory, and no others unless all fit."""
        every = self.elements(self.names) * 2 <= self.hold
        kept = {n: p for n, p in self._kept.items() if every or n in names}
        self._kept = kept
        for name in names:
            if name not in kept:
                kept[name] = (self._read(self.a, "first", name), self._read(self.b, "second", name))

    def elements(self, names: Sequence[str]) -> int:
        """Numbers in the tensors of one network."""
        return sum(math.prod(self.symmetry.tensors[n].shape) for n in names)

    def pair(self, name: str) -> Pair:
        """A tensor that is loaded."""
        return Pair(self.symmetry, name, self._kept[name][0], lambda n: self._kept[n][1])

    def pieces(self, name: str) -> Iterator[Pair]:
        """A tensor that need not be loaded, rows at a time where its rows are fixed ones."""
        layout = self.symmetry.tensors[name]
        fixed = layout.axes and not any(f.group for f in factors_of(layout.axes[0]))
        if name in self._kept or not fixed or layout.stack:
            self.load([*self._kept, *([] if name in self._kept else [name])])
            yield self.pair(name)
            return
        count = layout.shape[0]
        step = max(1, _ROWS * count // max(1, math.prod(layout.shape)))
        for at in range(0, count, step):
            end = min(at + step, count)
            axes = (Axis(((Factor(None, end - at),),)), *layout.axes[1:])
            part = replace(layout, shape=(end - at, *layout.shape[1:]), axes=axes)
            a, b = (
                self._read(reader, which, name, at, end)
                for reader, which in ((self.a, "first"), (self.b, "second"))
            )
            yield Pair(
                Symmetry(self.symmetry.groups, {name: part}),
                name,
                a,
                lambda _, b=b: b,  # type: ignore[misc]
            )

    def _read(
        self, reader: Reader, which: str, name: str, first: int = 0, last: int | None = None
    ) -> Tensor:
        found = reader.read(name, first, last)
        size = found.numel() * found.element_size()
        self.bytes_read += size
        if self.progress is not None:
            self.progress(size)
        plain = found.float() if found.element_size() == 1 else found
        if not math.isfinite(float(plain.sum())) and not bool(plain.isfinite().all()):
            raise SourceError(
                "an input holds numbers that are not finite",
                tensor=name,
                model=f"the {which} of the two",
                expected="finite numbers",
                do="that model is damaged or diverged",
            )
        return found


def product(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors of one shape: of short runs, which are added up exactly."""
    import torch

    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    runs = zip(*(torch.split(x.reshape(-1), _RUN) for x in (a, b)), strict=True)
    return math.fsum(float(torch.dot(x.to(wide), y.to(wide))) for x, y in runs)
