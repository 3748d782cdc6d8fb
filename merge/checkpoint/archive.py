"""The zip archive that torch.save writes: where its records lie, checked before torch opens it.

Only stored records are let through (a compressed one can be a thousand times its size), each within
the file and beside the others, so that an offset that torch reports can be held against them.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from typing import BinaryIO

from merge.errors import SourceError

__all__ = ["check_archive"]

MAX_PICKLE = 100_000_000  # bytes of the pickle, data apart; 30 000 tensors need three million
_LOCAL = struct.Struct("<4sHHHHHIIIHH")  # the header in front of a record


def check_archive(f: BinaryIO, path: str, size: int) -> dict[int, int]:
    """Where the records of the archive ``f`` of ``size`` bytes lie: first byte to length.

    Raises SourceError for an archive that torch.save would not have written.
    """
    try:
        with zipfile.ZipFile(f) as archive:
            infos = archive.infolist()
            _check_entries(infos, path)
            _check_pickle(archive, infos, path)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise SourceError(
            f"a damaged zip archive: {error}",
            file=path,
            do="the file may be cut off: fetch it again",
        ) from None
    records = sorted((_begin(f, info, path, size), info.file_size) for info in infos)
    end = 0
    for begin, length in records:
        if begin < end or begin + length > size:
            raise SourceError(
                "the records of the archive overlap or lead past its end",
                file=path,
                found=f"bytes {begin} to {begin + length}",
                expected=f"bytes between {end} and {size}",
            )
        end = begin + length
    return dict(records)


def _check_entries(infos: Sequence[zipfile.ZipInfo], path: str) -> None:
    if len({i.filename for i in infos}) < len(infos):
        raise SourceError("two records of the archive have one name", file=path)
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
            raise SourceError(
                "a record of the archive is compressed or encrypted, which torch.save never does",
                file=path,
                found=f"{info.filename}: {info.compress_size} bytes for {info.file_size}",
                expected="stored records",
                do="do not trust the file; save the weights anew as safetensors",
            )
    if any(i.filename.endswith("/constants.pkl") for i in infos):
        raise SourceError(
            "a TorchScript program, not a state dict",
            file=path,
            do="load it with torch.jit.load and save its state_dict() as safetensors",
        )


def _check_pickle(archive: zipfile.ZipFile, infos: Sequence[zipfile.ZipInfo], path: str) -> None:
    """One pickle of bounded size, with the checksum that is said of it; numbers in our order."""
    pickles = [i for i in infos if i.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise SourceError(
            "a zip archive, but not one of torch.save",
            file=path,
            found=f"{len(pickles)} records data.pkl",
            expected="one",
        )
    if pickles[0].file_size > MAX_PICKLE:
        raise SourceError(
            "the pickle that lists the tensors is too large to be that",
            file=path,
            found=f"{pickles[0].file_size} bytes",
            expected=f"at most {MAX_PICKLE} bytes",
            do="save the state dict alone, as safetensors",
        )
    archive.read(pickles[0])
    for order in (i for i in infos if i.filename.endswith("/byteorder") and i.file_size < 16):
        if archive.read(order) != b"little":
            raise SourceError(
                "the numbers are written in the other byte order",
                file=path,
                found=archive.read(order),
                expected="little",
                do="load it with torch and save it as safetensors",
            )


def _begin(f: BinaryIO, info: zipfile.ZipInfo, path: str, size: int) -> int:
    """Where a record's data lies: behind its own header, whose length varies by alignment."""
    at = info.header_offset
    f.seek(at if 0 <= at < size else size)
    raw = f.read(_LOCAL.size)
    fields = _LOCAL.unpack(raw) if len(raw) == _LOCAL.size else (b"",)
    if fields[0] != b"PK\x03\x04":
        raise SourceError(
            "a record of the archive is not where the archive says",
            file=path,
            found=f"{info.filename!r} at byte {at}",
            do="the file may be cut off: fetch it again",
        )
    return int(at + _LOCAL.size + fields[-2] + fields[-1])
