"""The small files of an output: their bytes, read when they are written."""

from __future__ import annotations

from pathlib import Path

from merge.errors import SourceError

__all__ = ["side_bytes"]


def side_bytes(path: str | None, text: str | None) -> bytes:
    """What a small file of the output holds: the bytes of ``path``, else ``text`` in UTF-8."""
    if path is None:
        return (text or "").encode()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SourceError(
            f"a side file cannot be read any more: {error.strerror}", file=path
        ) from None
