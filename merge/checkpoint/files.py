"""Weights in safetensors files, as a source of tensors.

Positional reads into the caller's buffers, no memory map: a map holds every page it touched in the
process's memory, and a file that shrinks under it kills the process without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from merge.checkpoint.header import Header
from merge.errors import SourceError
from merge.ir.expr import InputFile, Location

__all__ = ["FileSource"]


@dataclass(frozen=True, slots=True)
class FileSource:
    """The weight files of one checkpoint. Equal when path and files are equal."""

    identity: str
    files: tuple[InputFile, ...]
    _where: Mapping[str, tuple[InputFile, int]] = field(compare=False, repr=False)

    def __hash__(self) -> int:
        return hash(self.identity)  # the files are compared, not hashed for every tensor

    @classmethod
    def of(cls, identity: str, headers: Mapping[str, Header]) -> FileSource:
        """A source over checked headers, keyed by the folder ('' at the top) and file name."""
        where: dict[str, tuple[InputFile, int]] = {}
        for key, header in headers.items():
            folder = key.rpartition("/")[0]
            for name, begin in header.begin.items():
                where[f"{folder}/{name}" if folder else name] = (header.file, begin)
        return cls(identity, tuple(h.file for h in headers.values()), where)

    def location(self, name: str) -> Location:
        file, begin = self._where[name]
        return Location(file.path, begin)

    @contextmanager
    def open(self, name: str) -> Iterator[_FileReader]:
        file, begin = self._where[name]
        try:
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(
                f"a weight file cannot be opened: {error.strerror}", file=file.path, tensor=name
            ) from None
        try:
            _check_unchanged(fd, file, name)
            yield _FileReader(fd, begin, file.path, name)
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
