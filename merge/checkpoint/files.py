"""Weights in files, as a source of tensors.

Positional reads into the caller's buffers, no memory map: a map holds every page it touched in the
process's memory, and a file that shrinks under it kills the process without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merge.checkpoint.header import Header
from merge.checkpoint.memory import TensorInMemory
from merge.checkpoint.strided import StridedReader
from merge.errors import SourceError
from merge.ir.expr import InputFile, Location, TensorReader
from merge.ir.spec import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["FileSource"]


@dataclass(frozen=True, slots=True)
class FileSource:
    """The weight files of one checkpoint. Equal when path and files are equal."""

    identity: str
    files: tuple[InputFile, ...]
    _where: Mapping[str, tuple[InputFile, int]] = field(compare=False, repr=False)
    _views: Mapping[str, tuple[TensorSpec, tuple[int, ...]]] = field(compare=False, repr=False)
    _held: Mapping[str, torch.Tensor] = field(compare=False, repr=False)

    def __hash__(self) -> int:
        return hash(self.identity)  # the files are compared, not hashed for every tensor

    @classmethod
    def of(cls, identity: str, tables: Iterable[tuple[str, Header]]) -> FileSource:
        """A source over checked headers, each with the folder ('' at the top) of its file."""
        files: list[InputFile] = []
        where: dict[str, tuple[InputFile, int]] = {}
        views: dict[str, tuple[TensorSpec, tuple[int, ...]]] = {}
        held: dict[str, torch.Tensor] = {}
        for folder, header in tables:
            prefix = f"{folder}/" if folder else ""
            files.append(header.file)
            where.update((prefix + n, (header.file, at)) for n, at in header.begin.items())
            views.update((prefix + n, (header.tensors[n], s)) for n, s in header.strides.items())
            held.update((prefix + n, tensor) for n, tensor in header.held.items())
        return cls(identity, tuple(files), where, views, held)

    def location(self, name: str) -> Location:
        file, begin = self._where[name]
        return Location(file.path, begin)

    @contextmanager
    def open(self, name: str) -> Iterator[TensorReader]:
        if name in self._held:
            yield TensorInMemory(self._held[name])
            return
        file, begin = self._where[name]
        try:
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(
                f"a weight file cannot be opened: {error.strerror}", file=file.path, tensor=name
            ) from None
        try:
            _check_unchanged(fd, file, name)
            reader = _FileReader(fd, begin, file.path, name)
            view = self._views.get(name)
            yield reader if view is None else StridedReader(reader, *view)
            _check_unchanged(fd, file, name)
        finally:
            os.close(fd)


def _check_unchanged(fd: int, file: InputFile, name: str) -> None:
    now = os.fstat(fd)
    if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
        raise SourceError(
            "a weight file changed while it was in use",
            file=file.path,
            tensor=name,
            found=f"{now.st_size} bytes, modified at {now.st_mtime_ns} ns",
            expected=f"{file.size} bytes, modified at {file.mtime_ns} ns",
            do="leave the inputs alone while a merge runs, then run it again",
        )


@dataclass(frozen=True, slots=True)
class _FileReader:
    fd: int
    begin: int
    path: str
    name: str

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the tensor's bytes from ``start`` on."""
        done, at = 0, self.begin + start
        while done < len(view):
            try:
                got = os.preadv(self.fd, [view[done:]], at + done)
            except OSError as error:
                raise SourceError(
                    f"reading failed: {error.strerror}", file=self.path, tensor=self.name
                ) from None
            if got == 0:
                raise SourceError(
                    "a weight file became shorter while it was read",
                    file=self.path,
                    tensor=self.name,
                    found=f"its end at byte {at + done}",
                    expected=f"{len(view) - done} more bytes",
                )
            done += got
