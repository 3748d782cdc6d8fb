"""Weights in files, as a source of tensors.

Positional reads into the caller's buffers, no memory map: a map holds every page it touched in the
process's memory, and a file that shrinks under it kills the process without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from merge.checkpoint.header import Header
from merge.checkpoint.memory import TensorInMemory
from merge.checkpoint.strided import StridedReader
from merge.errors import SourceError
from merge.ir.expr import InputFile, Location, TensorReader
from merge.ir.spec import TensorSpec

__all__ = ["FileSource", "Stored", "opened"]


@dataclass(frozen=True, slots=True)
class Stored:
    """How a tensor is stored: its first byte in a file, and its size.

    view: spec and strides, in elements, of one that does not lie in one piece. tensor: the tensor
    itself, of a file that cannot be read in parts.
    """

    file: InputFile
    begin: int
    nbytes: int
    view: tuple[TensorSpec, tuple[int, ...]] | None = None
    tensor: TensorInMemory | None = None


@dataclass(frozen=True, slots=True)
class FileSource:
    """The weight files of one checkpoint. Equal when path and files are equal."""

    identity: str
    files: tuple[InputFile, ...]
    _where: Mapping[str, Stored] = field(compare=False, repr=False)

    def __hash__(self) -> int:
        return hash(self.identity)  # the files are compared, not hashed for every tensor

    @classmethod
    def of(cls, identity: str, tables: Iterable[tuple[str, Header]]) -> FileSource:
        """A source over checked headers, each with the folder ('' at the top) of its file."""
        tables = list(tables)
        where: dict[str, Stored] = {}
        for folder, header in tables:
            prefix = f"{folder}/" if folder else ""
            for name, spec in header.tensors.items():
                held, strides = header.held.get(name), header.strides.get(name)
                where[prefix + name] = Stored(
                    header.file,
                    header.begin.get(name, 0),
                    spec.nbytes,
                    None if strides is None else (spec, strides),
                    None if held is None else TensorInMemory(held),
                )
        return cls(identity, tuple(h.file for _, h in tables), where)

    def find(self, name: str) -> Stored:
        """How the tensor ``name`` is stored."""
        return self._where[name]

    def location(self, name: str) -> Location:
        found = self._where[name]
        return Location(found.file.path, found.begin)

    @contextmanager
    def open(self, name: str) -> Iterator[TensorReader]:
        found = self._where[name]
        if found.tensor is not None:
            yield found.tensor
            return
        with opened(found, found.file, name) as reader:
            yield reader


@contextmanager
def opened(found: Stored, file: InputFile, name: str) -> Iterator[TensorReader]:
    """The tensor ``name``, read from ``file``: its own, or a copy elsewhere."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(
            f"a weight file cannot be opened: {error.strerror}", file=file.path, tensor=name
        ) from None
    try:
        _check_unchanged(fd, file, name)
        reader = _FileReader(fd, found.begin, file.path, name)
        yield reader if found.view is None else StridedReader(reader, *found.view)
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
