"""Weights that are already in memory: a state dict or a live module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merge.errors import SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.dtypes import BY_NAME
from merge.ir.expr import Expr, InputFile, Location, Read
from merge.ir.side import Side
from merge.ir.spec import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["MemorySource", "TensorInMemory", "open_state_dict"]

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, eq=False)
class MemorySource:
    """Tensors of a state dict, by name; reads see the values at the time of the read."""

    identity: str
    _tensors: Mapping[str, torch.Tensor] = field(repr=False)

    @property
    def files(self) -> tuple[InputFile, ...]:
        return ()

    def location(self, name: str) -> Location:
        return Location("", 0)

    @contextmanager
    def open(self, name: str) -> Iterator[TensorInMemory]:
        yield TensorInMemory(self._tensors[name].detach().contiguous())


@dataclass(frozen=True, slots=True)
class TensorInMemory:
    """A contiguous tensor, open for reading."""

    tensor: torch.Tensor

    def read_into(self, start: int, view: memoryview) -> None:
        import torch

        size = self.tensor.element_size()
        # One element may lie in steps of more than one: torch calls it contiguous all the same.
        flat = self.tensor.as_strided((self.tensor.numel(),), (1,))
        flat = flat[start // size : (start + len(view)) // size]
        view[:] = flat.cpu().view(torch.uint8).numpy().data


def open_state_dict(
    state: Mapping[str, object], label: str | None = None, side: Side | None = None
) -> Checkpoint:
    """A checkpoint over the tensors of ``state``, which are not copied.

    Names that share one storage (tied weights) are noted: `save` writes them once.
    """
    import torch

    identity = label or f"state_dict #{next(_numbers)}"
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            raise SourceError(
                "a state dict holds something that is not a dense tensor",
                tensor=name,
                found=type(value).__name__,
                do="pass only the entries that are tensors",
            )
        if value.is_meta:
            raise SourceError(
                "a tensor has no data: it is on the meta device",
                tensor=name,
                do="load the weights first",
            )
        if value.numel():
            key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            owner = first.setdefault(key, name)
            if owner != name:
                tied[name] = owner
        tensors[name] = value
    source = MemorySource(identity, tensors)
    exprs: dict[str, Expr] = {}
    for name, value in tensors.items():
        dtype = BY_NAME.get(str(value.dtype).removeprefix("torch."))
        if dtype is None:
            raise SourceError("a tensor's dtype is not known", tensor=name, found=value.dtype)
        exprs[name] = Read(source, TensorSpec(tied.get(name, name), dtype, tuple(value.shape)))
    return Checkpoint(exprs, identity, side=side or Side(), tied=tied)
