"""The files of a checkpoint by name, wherever they lie: what opening one asks of its place.

Everything that finds weights, components and side files goes through `Files`, so that a folder
here and a repo on the Hub are opened by the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from merge.checkpoint.files import FileSource
from merge.checkpoint.header import Header, check_regular, read_header
from merge.checkpoint.inside import inside, is_there
from merge.errors import SourceError
from merge.ir.expr import Source
from merge.ir.json_text import not_an_object, not_sound, strict_json
from merge.ir.side import SideFile

__all__ = ["Files", "LocalFiles", "json_object", "read_json"]

_MAX_JSON = 50_000_000  # bytes; an index of 500 000 tensors is about this long


class Files(Protocol):
    """The files of one checkpoint. Names are relative to it, with ``/`` between folders."""

    @property
    def identity(self) -> str:
        """What the checkpoint is, in words: a real path, or a repo at a commit."""

    def where(self, name: str) -> str:
        """How an error calls the file or folder of that name; '' is the checkpoint itself."""

    def names(self, folder: str = "") -> Sequence[str]:
        """The plain names of all that lies in a folder, sorted."""

    def is_there(self, name: str) -> bool:
        """Whether there is something of that name, be it a link that leads nowhere."""

    def is_file(self, name: str) -> bool:
        """Whether it is a file, or a link."""

    def is_folder(self, name: str) -> bool:
        """Whether it is a folder, or a link to one."""

    def check(self, name: str) -> None:
        """SourceError for a link that leads out of the checkpoint."""

    def small(self, name: str) -> Path:
        """A small file as a file on this machine; SourceError where there is none."""

    def side(self, name: str) -> SideFile:
        """A small file to copy."""

    def header(self, name: str) -> Header:
        """The checked header of a safetensors file."""

    def pickle(self, name: str) -> Header:
        """The same of a pickle of torch."""

    def source(self, tables: Iterable[tuple[str, Header]]) -> Source:
        """The source of the tensors of checked headers, each with the folder of its file."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """A folder on this machine; ``root`` is its real path."""

    root: Path

    @classmethod
    def of(cls, folder: Path) -> LocalFiles:
        """The files in ``folder``, whose own links are followed."""
        return cls(folder.resolve())

    @property
    def identity(self) -> str:
        return str(self.root)

    def where(self, name: str) -> str:
        return str(self.root / name)

    def names(self, folder: str = "") -> list[str]:
        return sorted(p.name for p in (self.root / folder).iterdir())

    def is_there(self, name: str) -> bool:
        return is_there(self.root / name)

    def is_file(self, name: str) -> bool:
        path = self.root / name
        return path.is_file() or path.is_symlink()

    def is_folder(self, name: str) -> bool:
        return (self.root / name).is_dir()

    def check(self, name: str) -> None:
        inside(self.root, name)

    def small(self, name: str) -> Path:
        path = inside(self.root, name)
        check_regular(path, "file")
        return path

    def side(self, name: str) -> SideFile:
        path = inside(self.root, name)
        info = check_regular(path, "side file")
        return SideFile(name, str(path), info.st_size, info.st_mtime_ns)

    def header(self, name: str) -> Header:
        return read_header(inside(self.root, name))

    def pickle(self, name: str) -> Header:
        from merge.checkpoint.pickles import read_pickle

        return read_pickle(inside(self.root, name))

    def source(self, tables: Iterable[tuple[str, Header]]) -> Source:
        return FileSource.of(self.identity, tables)


def read_json(files: Files, name: str) -> object:
    """The JSON of a small file of the checkpoint; None when there is no such file."""
    if not files.is_there(name):
        return None
    path, where = files.small(name), files.where(name)
    if path.stat().st_size > _MAX_JSON:
        raise SourceError("a JSON file is too large to be what it says", file=where)
    try:
        return strict_json(path.read_bytes(), infinite=True)
    except ValueError as error:
        raise not_sound(error, file=where) from None
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=where) from None


def json_object(files: Files, name: str) -> dict[str, object]:
    """A JSON object from a small file; {} when there is none."""
    parsed = read_json(files, name)
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise not_an_object(parsed, file=files.where(name))
    return parsed
