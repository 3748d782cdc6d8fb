"""Names and small files of a checkpoint folder: nothing leads out of it, no JSON is taken on trust.

A name in an index or a list of modules is data from a stranger: it must be the plain name of
something beside it. Links may lead anywhere inside the folder, and to the blobs of a Hub cache.
"""

from __future__ import annotations

from pathlib import Path

from merge.checkpoint.header import check_regular
from merge.errors import SourceError
from merge.ir.json_text import not_an_object, not_sound, strict_json

__all__ = ["inside", "is_plain", "is_there", "json_object", "read_json"]

_MAX_JSON = 50_000_000  # bytes; an index of 500 000 tensors is about this long


def is_plain(name: str) -> bool:
    """Whether ``name`` is a file's own name: no separator, drive, escape or control character."""
    return (
        bool(name)
        and len(name) <= 255
        and name not in (".", "..")
        and not any(c in '/\\:%"' or ord(c) < 32 for c in name)
    )


def is_there(path: Path) -> bool:
    """Whether there is something at ``path``, be it a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def inside(root: Path, name: str) -> Path:
    """``root/name``, which may not be a link out of ``root``, but to a Hub cache's blobs."""
    path = root / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError):
        raise SourceError("a file is a link that leads round in a circle", file=path) from None
    if root not in real.parents and real.parent != _blobs(root):
        raise SourceError(
            "a file is a link that leads out of its folder",
            file=path,
            found=str(real),
            expected=f"a file in {root}",
            do="copy the file here, or name the real folder",
        )
    return path


def _blobs(root: Path) -> Path | None:
    """Where a Hub cache keeps the content of ``root``, a snapshot or a folder in one."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            return folder.parent.parent / "blobs"
    return None


def read_json(root: Path, name: str) -> object:
    """The JSON of a small file of the checkpoint; None when there is no such file."""
    if not is_there(root / name):
        return None
    path = inside(root, name)
    if check_regular(path, "file").st_size > _MAX_JSON:
        raise SourceError("a JSON file is too large to be what it says", file=path)
    try:
        return strict_json(path.read_bytes(), infinite=True)
    except ValueError as error:
        raise not_sound(error, file=path) from None
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=path) from None


def json_object(root: Path, name: str) -> dict[str, object]:
    """A JSON object from a small file; {} when there is none."""
    parsed = read_json(root, name)
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise not_an_object(parsed, file=root / name)
    return parsed
