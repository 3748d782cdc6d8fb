"""Where tiles live while they are computed: buffers on the CPU, or on a GPU behind pinned memory.

A stage belongs to one worker. Buffers are taken one after another within a tile and all given back
at its end, so that the next tile finds them warm in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from merge.ir.dtypes import DType
from merge.ir.expr import TensorReader

__all__ = ["CpuStage", "CudaStage", "Stage", "bytes_of", "torch_dtype"]


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's own object for an element type."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Stage(Protocol):
    """A worker's buffers and its way to and from the device."""

    def begin_tile(self) -> None:
        """Give all buffers back."""

    def scope(self) -> AbstractContextManager[None]:
        """Give back, at its end, the buffers that were taken in it."""

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A one-dimensional buffer on the device, content undefined."""

    def take_host(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The same in host memory."""

    def moved(self, host: Tensor) -> Tensor:
        """A tensor of host memory on the device, valid as long as that."""

    def load(
        self, reader: TensorReader, dtype: DType, start: int, stop: int, compute: torch.dtype
    ) -> Tensor:
        """Elements ``start`` to ``stop`` of a stored tensor, as ``compute`` on the device."""

    def host(self, result: Tensor, dtype: DType) -> Tensor:
        """``result`` rounded to ``dtype``, contiguous in host memory, valid until the next tile."""

    def raw(self, reader: TensorReader, dtype: DType, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` as they are stored, in host memory."""

    def close(self) -> None:
        """Free the buffers."""


class _Pool:
    """Buffers by dtype, handed out in order; grown when a tile is larger than any before."""

    def __init__(self, **where: Any) -> None:
        self.where = where
        self.held: dict[torch.dtype, list[Tensor]] = {}
        self.used: dict[torch.dtype, int] = {}

    def reset(self) -> None:
        self.used.clear()

    @contextmanager
    def scope(self) -> Iterator[None]:
        before = dict(self.used)
        yield
        self.used = before

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        held, at = self.held.setdefault(dtype, []), self.used.get(dtype, 0)
        self.used[dtype] = at + 1
        if at == len(held):
            held.append(torch.empty(numel, dtype=dtype, **self.where))
        elif held[at].numel() < numel:
            held[at] = torch.empty(numel, dtype=dtype, **self.where)
        return held[at][:numel]


@cache
def _values(eight_bits: torch.dtype, compute: torch.dtype) -> Tensor:
    """What each byte stands for in a type of eight bits."""
    return torch.arange(256, dtype=torch.uint8).view(eight_bits).to(compute)


class CpuStage:
    """Tiles in ordinary memory."""

    def __init__(self) -> None:
        self._pool = _Pool()

    def begin_tile(self) -> None:
        self._pool.reset()

    def scope(self) -> AbstractContextManager[None]:
        return self._pool.scope()

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._pool.take(numel, dtype)

    def load(
        self, reader: TensorReader, dtype: DType, start: int, stop: int, compute: torch.dtype
    ) -> Tensor:
        stored = torch_dtype(dtype)
        if stored == compute:
            return self.raw(reader, dtype, start, stop)
        out = self.take(stop - start, compute)
        raw = self.raw(reader, dtype, start, stop)
        if dtype.bits == 8:  # looked up, several times as fast as converted
            torch.index_select(_values(stored, compute), 0, raw.view(torch.uint8).int(), out=out)
        else:
            out.copy_(raw)
        self._pool.used[stored] -= 1  # the raw tile is free again: one for all loads
        return out

    def take_host(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._pool.take(numel, dtype)

    def moved(self, host: Tensor) -> Tensor:
        return host

    def raw(self, reader: TensorReader, dtype: DType, start: int, stop: int) -> Tensor:
        out = self.take_host(stop - start, torch_dtype(dtype))
        reader.read_into(start * dtype.itemsize, bytes_of(out))
        return out

    def host(self, result: Tensor, dtype: DType) -> Tensor:
        flat, wanted = result.reshape(-1), torch_dtype(dtype)
        if flat.dtype == wanted:
            return flat.contiguous()
        return self.take(flat.numel(), wanted).copy_(flat)

    def close(self) -> None:
        self._pool = _Pool()


class CudaStage:
    """Tiles on a GPU. Each worker has a stream: one's copies overlap another's kernels."""

    def __init__(self, device: str) -> None:
        kind, _, number = device.partition(":")
        at = int(number) if number else torch.cuda.current_device()
        self._device = torch.device(kind, at)  # set_device takes no device without a number
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = _Pool(device=self._device)
        self._pinned = _Pool(pin_memory=True)
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(self._stream)

    def begin_tile(self) -> None:
        self._stream.synchronize()  # the pinned buffers are about to be overwritten
        self._pool.reset()
        self._pinned.reset()

    @contextmanager
    def scope(self) -> Iterator[None]:
        with self._pool.scope(), self._pinned.scope():
            yield
            self._stream.synchronize()  # the pinned buffers are free again

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._pool.take(numel, dtype)

    def load(
        self, reader: TensorReader, dtype: DType, start: int, stop: int, compute: torch.dtype
    ) -> Tensor:
        staged = self.moved(self.raw(reader, dtype, start, stop))
        return staged if staged.dtype == compute else self.take(stop - start, compute).copy_(staged)

    def take_host(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._pinned.take(numel, dtype)

    def moved(self, host: Tensor) -> Tensor:
        return self.take(host.numel(), host.dtype).copy_(host, non_blocking=True)

    def raw(self, reader: TensorReader, dtype: DType, start: int, stop: int) -> Tensor:
        out = self.take_host(stop - start, torch_dtype(dtype))
        reader.read_into(start * dtype.itemsize, bytes_of(out))
        return out

    def host(self, result: Tensor, dtype: DType) -> Tensor:
        flat, wanted = result.reshape(-1), torch_dtype(dtype)
        if flat.dtype != wanted:
            flat = self.take(flat.numel(), wanted).copy_(flat)
        out = self._pinned.take(flat.numel(), wanted)
        if flat.is_cuda:
            out.copy_(flat, non_blocking=True)
            self._stream.synchronize()
        else:
            out.copy_(flat)
        return out

    def close(self) -> None:
        self._stream.synchronize()
        self._pool, self._pinned = _Pool(), _Pool()
