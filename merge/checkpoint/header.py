"""Read and check a safetensors header before a single byte is allocated for weights.

The checks are the format's own (offsets tile the data exactly, sizes match shapes), in plain
Python integers, so that an error names the file, the tensor, what was found and expected.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from merge.errors import SourceError
from merge.ir.dtypes import BY_CODE
from merge.ir.expr import InputFile
from merge.ir.json_text import strict_json
from merge.ir.spec import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Header", "check_regular", "is_tensor_name", "parse_header", "read_header"]

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_NAME = 4096  # characters
_MAX_INT = 2**63 - 1
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Header:
    """What a weight file holds, checked. ``begin``: the offset of each tensor's bytes in the file.

    The other fields are of pickles only. strides: of tensors that do not lie in one piece, in
    elements. held: tensors in memory, of files that cannot be read in parts. tied: names that share
    another's bytes, and that name. dropped: what is no weight, and why. notes: for the plan.
    """

    file: InputFile
    tensors: dict[str, TensorSpec]
    begin: dict[str, int]
    metadata: dict[str, str]
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    held: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, file: InputFile) -> Header:
        """The same header, as that of ``file``."""
        return replace(self, file=file)


def is_tensor_name(name: str) -> bool:
    """Whether ``name`` can be a tensor's: not empty, not too long, no control characters."""
    return 0 < len(name) <= MAX_NAME and not _CONTROL.search(name)


def check_regular(path: Path, noun: str = "weight file") -> os.stat_result:
    """The stat of ``path``; SourceError when it is missing or is a folder, pipe or device."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise SourceError(f"a {noun} is missing", file=path) from None
    except OSError as error:
        raise SourceError(f"a {noun} cannot be read: {error.strerror}", file=path) from None
    if not stat.S_ISREG(info.st_mode):
        raise SourceError(f"a {noun} is not a regular file", file=path, expected="a regular file")
    return info


def read_header(path: Path) -> Header:
    """The header of the safetensors file ``path``; SourceError for anything that is not sound."""
    info = check_regular(path)
    try:
        with path.open("rb") as f:
            return parse_header(f, InputFile(str(path), info.st_size, info.st_mtime_ns))
    except OSError as error:
        raise SourceError(f"a weight file cannot be read: {error.strerror}", file=path) from None


def parse_header(f: BinaryIO, file: InputFile) -> Header:
    """The header that ``f`` begins with, of ``file``; SourceError for one that is not sound."""
    path, size = file.path, file.size
    first = f.read(8)
    if len(first) < 8:
        raise SourceError(
            "not a safetensors file: too short for its first field",
            file=path,
            found=f"{len(first)} bytes",
            expected="at least 8 bytes",
            do="the file may be cut off or empty: fetch it again",
        )
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER or 8 + length > size:
        raise SourceError(
            "the header is longer than the file or than the format allows",
            file=path,
            found=f"a header of {length} bytes in a file of {size} bytes",
            expected=f"at most {min(MAX_HEADER, max(size - 8, 0))} bytes",
            do="the file is cut off or is not safetensors: fetch it again",
        )
    text = f.read(length)
    if len(text) < length:
        raise SourceError(
            "the header is cut off", file=path, found=f"{len(text)} of {length} bytes"
        )
    try:
        parsed = strict_json(text)
    except ValueError as error:
        raise SourceError(f"the header is not sound JSON: {error}", file=path) from None
    if not isinstance(parsed, dict):
        raise SourceError("the header is not a JSON object", file=path)
    metadata = _metadata(parsed.pop("__metadata__", {}), path)
    entries = [_entry(name, entry, path) for name, entry in parsed.items()]
    _check_tiling([(b, e, s.name) for s, b, e in entries], size - 8 - length, path)
    return Header(
        file,
        {s.name: s for s, _, _ in entries},
        {s.name: 8 + length + b for s, b, _ in entries},
        metadata,
    )


def _metadata(raw: object, path: str) -> dict[str, str]:
    if isinstance(raw, dict) and all(isinstance(v, str) for v in raw.values()):
        return raw
    raise SourceError("the header's __metadata__ is not a map from text to text", file=path)


def _entry(name: str, raw: object, path: str) -> tuple[TensorSpec, int, int]:
    """One tensor's spec and byte range, sizes checked against each other."""

    def wrong(what: str, found: object = None, expected: object = None) -> SourceError:
        return SourceError(what, file=path, tensor=_show(name), found=found, expected=expected)

    if not is_tensor_name(name):
        raise wrong("a tensor's name is empty, too long or holds control characters")
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise wrong(
            "a tensor's entry has the wrong fields",
            found=sorted(raw) if isinstance(raw, dict) else type(raw).__name__,
            expected="dtype, shape, data_offsets",
        )
    dtype = BY_CODE.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise wrong("a tensor's dtype is not known", raw["dtype"], ", ".join(BY_CODE))
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _naturals(shape):
        raise wrong("a tensor's shape is not a list of sizes", shape, "whole numbers from 0 up")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("a tensor's offsets are not a byte range", offsets, "[begin, end] in order")
    numel = math.prod(shape)
    if numel > _MAX_INT or numel * dtype.bits > _MAX_INT * 8:
        raise wrong("a tensor is larger than any file", f"shape {shape}")
    if numel * dtype.bits % 8:
        raise wrong("a packed tensor does not fill whole bytes", f"shape {shape}")
    begin, end = offsets
    if end - begin != numel * dtype.bits // 8:
        raise wrong(
            "a tensor's byte range does not fit its shape",
            found=f"{end - begin} bytes",
            expected=f"{numel * dtype.bits // 8} bytes for {dtype.name}{shape}",
        )
    return TensorSpec(name, dtype, tuple(shape)), begin, end


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= _MAX_INT for v in value
    )


def _check_tiling(ranges: list[tuple[int, int, str]], size: int, path: str) -> None:
    """The byte ranges must cover the data exactly: no overlap, no hole, nothing after the end."""
    at, before = 0, "the header"
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise SourceError(
                "two tensors overlap" if begin < at else "there is a hole between two tensors",
                file=path,
                tensor=_show(name),
                found=f"bytes {begin} to {end}, after {_show(before)} which ends at {at}",
                expected=f"to begin at byte {at}",
            )
        at, before = end, name
    if at != size:
        raise SourceError(
            "the file is cut off" if at > size else "the file has bytes after the last tensor",
            file=path,
            found=f"{size} bytes of data",
            expected=f"{at} bytes of data, up to the end of {_show(before)}",
            do="fetch the file again" if at > size else None,
        )


def _show(name: str) -> str:
    text = repr(name)
    return text if len(text) <= 120 else text[:117] + "..."
