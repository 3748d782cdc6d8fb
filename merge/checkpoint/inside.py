"""Names of a checkpoint folder: nothing leads out of it.

A name in an index or a list of modules is data from a stranger: it must be the plain name of
something beside it. Links may lead anywhere inside the folder, and to the blobs of a Hub cache.
"""

from __future__ import annotations

from pathlib import Path

from merge.errors import SourceError

__all__ = ["inside", "is_plain", "is_there"]


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
