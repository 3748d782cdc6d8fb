"""Tensors that are computed in portions when one of them is first read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from merge.ir.checkpoint import Checkpoint
from merge.ir.dtypes import parse_dtype
from merge.ir.expr import Expr, InputFile, Location, Read
from merge.ir.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["computed_checkpoint", "cut"]

T = TypeVar("T")

Compute = Callable[[Sequence[str]], Mapping[str, "Tensor"]]
"""From the names of a portion to its tensors."""

_KEPT = 2
"""Portions in memory: workers are not all at the same tensor."""


def computed_checkpoint(
    label: str,
    shapes: Mapping[str, tuple[int, ...]],
    portions: Sequence[Sequence[str]],
    compute: Compute,
    dtype: str = "float32",
) -> Checkpoint:
    """A checkpoint whose tensors are computed a portion at a time, in the order of the portions.

    At most two portions are held. What is read again after it was let go is computed again.
    """
    source = _Computed(label, portions, compute, dtype)
    kind = parse_dtype(dtype)
    tensors: dict[str, Expr] = {
        n: Read(source, TensorSpec(n, kind, shapes[n])) for part in portions for n in part
    }
    return Checkpoint(tensors, label)


def cut(items: Iterable[T], size: Callable[[T], int], memory: int) -> list[list[T]]:
    """The items in portions, in their order, that take at most ``memory`` bytes, or are one.

    >>> cut(["a", "b", "c"], lambda item: 4, 8)
    [['a', 'b'], ['c']]
    """
    found: list[list[T]] = []
    held = 0
    for item in items:
        need = size(item)
        if not found or held + need > memory:
            found.append([])
            held = 0
        found[-1].append(item)
        held += need
    return found


@dataclass(slots=True, eq=False)
class _Computed:
    """A source of tensors that are not there yet."""

    identity: str
    portions: Sequence[Sequence[str]]
    compute: Compute
    dtype: str
    _held: OrderedDict[int, dict[str, Tensor]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: int = 0

    def __post_init__(self) -> None:
        import torch

        self._threads = torch.get_num_threads()

    @property
    def files(self) -> tuple[InputFile, ...]:
        return ()

    def location(self, name: str) -> Location:
        part = self._part(name)
        before = sum(len(p) for p in self.portions[:part])
        return Location("", before + list(self.portions[part]).index(name))

    @contextmanager
    def open(self, name: str) -> Iterator[_Reader]:
        part = self._part(name)
        with self._lock:
            if part not in self._held:
                self._held[part] = self._made(part)
                while len(self._held) > _KEPT:
                    self._held.popitem(last=False)
            tensor = self._held[part][name]
        yield _Reader(tensor)

    def _part(self, name: str) -> int:
        return next(i for i, part in enumerate(self.portions) if name in part)

    def _made(self, part: int) -> dict[str, Tensor]:
        """One portion, by as many threads as torch had when the source was made."""
        import torch

        dtype = getattr(torch, self.dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode(False):
                found = self.compute(self.portions[part])
                return {n: t.detach().to(dtype).contiguous() for n, t in found.items()}
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class _Reader:
    """A tensor in memory, open for reading."""

    tensor: Tensor

    def read_into(self, start: int, view: memoryview) -> None:
        import torch

        size = self.tensor.element_size()
        part = self.tensor.reshape(-1)[start // size : (start + len(view)) // size]
        view[:] = part.view(torch.uint8).numpy().data
