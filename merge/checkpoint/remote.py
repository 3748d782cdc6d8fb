"""A repo on the Hub as the files of a checkpoint: headers by range, tensors by range, nothing kept.

What is in the user's cache as a whole is read there. Small files are fetched into it when they are
needed; of weight files the headers alone are kept, under the digest of the file they are of.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from merge.checkpoint.files import FileSource, opened
from merge.checkpoint.header import Header, parse_header, read_header
from merge.checkpoint.strided import StridedReader
from merge.errors import SourceError
from merge.hub import Hub, Pinned, RemoteFile
from merge.hub.client import Entry
from merge.hub.told import offline
from merge.ir.expr import InputFile, Location, Source, Span, TensorReader
from merge.ir.side import SideFile

__all__ = ["HubFiles"]

_FIRST = 100_000  # bytes of the first request for a header: 97 of 100 are shorter
_BLOCK = 4096  # bytes of a pickle's archive that are read at once
_AHEAD = 8 << 20  # bytes that a reader on its own reads ahead


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files of a repo at a commit, or of one of its folders."""

    hub: Hub = field(compare=False, repr=False)
    pinned: Pinned
    listing: Mapping[str, Entry] = field(compare=False, repr=False)
    folder: str = ""

    @classmethod
    def of(cls, hub: Hub, repo: str, revision: str | None, folder: str = "") -> HubFiles:
        """The repo at what the revision stands for now."""
        pinned = hub.pin(repo, revision)
        listing = hub.listing(pinned)
        prefix = f"{folder}/" if folder else ""
        if folder and not any(n.startswith(prefix) for n in listing):
            raise SourceError(
                "the repo has no such folder",
                repo=repo,
                revision=revision,
                found=folder,
                expected=", ".join(sorted({n.partition("/")[0] for n in listing})[:8]),
            )
        return cls(hub, pinned, listing, folder)

    @property
    def identity(self) -> str:
        return self.where("")

    def where(self, name: str) -> str:
        return "/".join(filter(None, (str(self.pinned), self.folder, name)))

    def _full(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def names(self, folder: str = "") -> list[str]:
        within = self._full(folder).strip("/")
        prefix = f"{within}/" if within else ""
        found = (n.removeprefix(prefix) for n in self.listing if n.startswith(prefix))
        return sorted({n.partition("/")[0] for n in found})

    def is_there(self, name: str) -> bool:
        return self.is_file(name) or self.is_folder(name)

    def is_file(self, name: str) -> bool:
        return self._full(name) in self.listing

    def is_folder(self, name: str) -> bool:
        within = self._full(name).strip("/")
        return not within or any(n.startswith(f"{within}/") for n in self.listing)

    def check(self, name: str) -> None:
        """Nothing: a repo's files lead nowhere else."""

    def _entry(self, name: str) -> Entry:
        entry = self.listing.get(self._full(name))
        if entry is not None:
            return entry
        place = self.hub.place(self.pinned.repo, self.pinned.asked, self._full(name))
        if self.hub.is_offline:
            raise offline(place)
        raise SourceError(
            "a file is missing in the repo", do="ask its author to upload it again", **place.at()
        )

    def small(self, name: str) -> Path:
        self._entry(name)
        return self.hub.fetch(self.pinned, self._full(name))

    def side(self, name: str) -> SideFile:
        entry = self._entry(name)
        fetch = partial(_fetched, self.hub, self.pinned, self._full(name))
        return SideFile(name, self.where(name), entry.size, 0, fetch)

    # -- weights ----------------------------------------------------------------------------------

    def _input(self, name: str) -> InputFile:
        entry = self._entry(name)
        return InputFile(self.where(name), entry.size, 0, entry.digest if entry.large else None)

    def _whole(self, name: str) -> Path | None:
        """The file in the user's cache, if it is there, or is to be."""
        if self.hub.download or self.hub.is_offline:
            self._entry(name)
            return self.hub.fetch(self.pinned, self._full(name))
        found = self.hub.cached(self.pinned, self._full(name))
        if found is not None and found.stat().st_size != self._entry(name).size:
            return None  # of another program, cut off
        return found

    def header(self, name: str) -> Header:
        file = self._input(name)
        if (whole := self._whole(name)) is not None:
            return read_header(whole).of(file)
        remote = self.hub.remote(self.pinned, self._full(name))
        kept = _kept_header(remote.entry.digest)
        if kept is not None and kept.is_file():
            with suppress(SourceError, OSError):  # damaged: it is fetched again
                return parse_header(io.BytesIO(kept.read_bytes()), file)
        try:
            text = _fetch_header(remote)
            parsed = parse_header(io.BytesIO(text), file)
        except SourceError as error:
            if "repo" in error.where:
                raise
            text = _fetch_header(remote)  # it may have come damaged
            parsed = parse_header(io.BytesIO(text), file)
        if kept is not None:
            _keep(kept, text)
        return parsed

    def pickle(self, name: str) -> Header:
        from merge.checkpoint.pickles import read_pickle, read_pickle_from

        file = self._input(name)
        if (whole := self._whole(name)) is not None:
            return read_pickle(whole).of(file)
        remote = self.hub.remote(self.pinned, self._full(name))
        with io.BufferedReader(_Seekable(remote), _BLOCK) as f:
            return read_pickle_from(f, file)

    def source(self, tables: Iterable[tuple[str, Header]]) -> Source:
        tables = list(tables)
        remote: dict[str, RemoteFile] = {}
        local: dict[str, InputFile] = {}
        root = self.where("") + "/"
        for _, header in tables:
            name = header.file.path.removeprefix(root)
            whole = self._whole(name)
            if whole is None:
                remote[header.file.path] = self.hub.remote(self.pinned, self._full(name))
            else:
                info = whole.stat()
                local[header.file.path] = InputFile(str(whole), info.st_size, info.st_mtime_ns)
        return HubSource(FileSource.of(self.identity, tables), remote, local)


def _fetched(hub: Hub, pinned: Pinned, name: str) -> str:
    return str(hub.fetch(pinned, name))


@dataclass(frozen=True, slots=True)
class HubSource:
    """Tensors of a repo at a commit: of files in the cache from there, of others by ranges."""

    table: FileSource
    remote: Mapping[str, RemoteFile] = field(compare=False, repr=False)
    local: Mapping[str, InputFile] = field(compare=False, repr=False)

    def __hash__(self) -> int:
        return hash(self.table)

    @property
    def identity(self) -> str:
        return self.table.identity

    @property
    def files(self) -> tuple[InputFile, ...]:
        return self.table.files

    def location(self, name: str) -> Location:
        return self.table.location(name)

    def span(self, name: str) -> Span | None:
        """Where a tensor lies in one piece, far away; None for one that is read otherwise."""
        found = self.table.find(name)
        if found.view or found.tensor is not None or found.file.path not in self.remote:
            return None
        return Span(found.file.path, found.begin, found.begin + found.nbytes)

    def fetch(self, file: str, begin: int, view: memoryview) -> None:
        """Fill ``view`` with bytes of a file that is far away."""
        self.remote[file].read_into(begin, view)

    def head(self, file: str) -> bytes | None:
        """The header of a file that is far away, where it is kept."""
        kept = _kept_header(self.remote[file].entry.digest)
        return kept.read_bytes() if kept is not None and kept.is_file() else None

    @contextmanager
    def open(self, name: str) -> Iterator[TensorReader]:
        found = self.table.find(name)
        if found.tensor is not None:
            yield found.tensor
            return
        if (remote := self.remote.get(found.file.path)) is None:
            with opened(found, self.local[found.file.path], name) as near:
                yield near
            return
        reader = _RangeReader(remote, found.begin)
        yield reader if found.view is None else StridedReader(reader, *found.view)


class _RangeReader:
    """One tensor, by ranges; what is read in order is read ahead."""

    def __init__(self, file: RemoteFile, begin: int) -> None:
        self.file, self.begin = file, begin
        self._at, self._held = 0, b""

    def read_into(self, start: int, view: memoryview) -> None:
        at = self.begin + start
        inside = at - self._at
        if not 0 <= inside <= len(self._held) - len(view):
            if len(view) >= _AHEAD:
                self.file.read_into(at, view)
                return
            held = bytearray(min(max(len(view), _AHEAD), self.file.entry.size - at))
            self.file.read_into(at, memoryview(held))
            self._at, self._held, inside = at, bytes(held), 0
        view[:] = self._held[inside : inside + len(view)]


class _Seekable(io.RawIOBase):
    """A file on the Hub for those who want one to seek in: torch's reader of pickles.

    What was read is kept in blocks: the records of an archive are looked at twice.
    """

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self.file, self._at = file, 0
        self._blocks: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        size = self.file.entry.size
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        begin = self._at
        end = min(begin + len(view), self.file.entry.size)
        if begin >= end:
            return 0
        first, last = begin // _BLOCK, (end - 1) // _BLOCK
        self._fetch(first, last)
        held = b"".join(self._blocks[n] for n in range(first, last + 1))
        view[: end - begin] = held[begin - first * _BLOCK : end - first * _BLOCK]
        self._at = end
        return end - begin

    def _fetch(self, first: int, last: int) -> None:
        """Have the blocks from ``first`` to ``last``, those that are missing in one request."""
        missing = [n for n in range(first, last + 1) if n not in self._blocks]
        if not missing:
            return
        begin = missing[0] * _BLOCK
        data = bytearray(min((missing[-1] + 1) * _BLOCK, self.file.entry.size) - begin)
        self.file.read_into(begin, memoryview(data))
        for n in range(missing[0], missing[-1] + 1):
            at = n * _BLOCK - begin
            self._blocks[n] = bytes(data[at : at + _BLOCK])


# -- headers that are kept -------------------------------------------------------------------------


def _fetch_header(remote: RemoteFile) -> bytes:
    """The first bytes of a file, up to the end of its header; the rest of the answer goes."""
    size = remote.entry.size
    first = bytearray(min(_FIRST, size))
    remote.read_into(0, memoryview(first))
    length = 8 + int.from_bytes(first[:8], "little")
    if len(first) < length <= min(size, MAX_FETCHED):
        rest = bytearray(length - len(first))
        remote.read_into(len(first), memoryview(rest))
        first += rest
    return bytes(first[:length])


MAX_FETCHED = 100_000_008  # bytes; a longer header is refused before it is fetched


def _kept_header(digest: str) -> Path | None:
    """Where the header of the file of that digest is kept; None without a place for it."""
    from huggingface_hub import cached_assets_path, constants

    try:
        folder = cached_assets_path("hf-merge", "headers", assets_dir=constants.HF_ASSETS_CACHE)
        return folder / f"{digest}.header"
    except OSError:
        return None


def _keep(path: Path, text: bytes) -> None:
    partial_ = path.with_suffix(f".{id(text):x}")
    with suppress(OSError):  # it is only asked for again
        partial_.write_bytes(text)
        partial_.replace(path)
