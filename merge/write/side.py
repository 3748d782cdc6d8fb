"""The small files of an output: their bytes, read when they are written."""

from __future__ import annotations

from pathlib import Path

from merge.errors import SourceError
from merge.plan.model import SideOutput

__all__ = ["side_bytes"]


def side_bytes(side: SideOutput) -> bytes:
    """What a small file of the output holds: its data, or the bytes of a file, or text in UTF-8."""
    if side.data is not None:
        return side.data
    path = side.local()
    if path is None:
        return (side.text or "").encode()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SourceError(
            f"a side file cannot be read any more: {error.strerror}", file=path
        ) from None
