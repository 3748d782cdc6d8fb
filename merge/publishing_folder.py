"""Finished folders published on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from merge.errors import SourceError
from merge.plan.model import SideOutput
from merge.publishing import (
    Notice,
    Progress,
    Published,
    admitted,
    first_line,
    open_ledger,
    published,
)
from merge.write.card import CARD
from merge.write.manifest import read_manifest
from merge.write.publication import Made, Publication
from merge.write.side import side_bytes

if TYPE_CHECKING:
    from merge.write.admission import Admission

__all__ = ["push_folder"]

_SMALL = 10_000_000  # bytes; larger files are large files to the Hub whatever their names
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def push_folder(
    folder: Path,
    repo: Admission,
    *,
    check: bool = True,
    fresh: bool = False,
    progress: Progress | None = None,
    notice: Notice = lambda _: None,
) -> Published:
    """Publish a finished folder: what its manifest says of it is checked first, then it is sent.

    check: False for one that was written a moment ago. Hidden files are left out. The rest as for
    `push_plan`.
    """
    if check:
        _check_folder(folder, notice)
    files = {p.relative_to(folder).as_posix(): p for p in _files(folder)}
    manifest = read_manifest(folder)
    listed = set() if manifest is None else set(manifest.weights)
    large = {n for n, p in files.items() if p.stat().st_size > _SMALL or n.endswith(_WEIGHTS)}
    weights, small = sorted(listed | large), sorted(set(files) - listed - large)
    card = files[CARD].read_text() if CARD in files else None
    private = admitted(repo, card, (), notice)
    key = hashlib.sha256(b"" if manifest is None else manifest.plan.encode())
    for name in weights:
        found = files[name].stat()
        key.update(f"{name!r} {found.st_size} {found.st_mtime_ns}\n".encode())

    @contextmanager
    def make(file: str) -> Iterator[Made]:
        yield Made(files[file])

    with open_ledger(repo, key.hexdigest(), fresh=fresh) as ledger:
        outcome = Publication(
            repo,
            ledger,
            weights=weights,
            side=small,
            make=make,
            content=lambda _: {n: side_bytes(SideOutput(n, str(files[n]))) for n in small},
            message=repo.target.message or f"Publish {first_line(folder.resolve().name)}",
            mark=key.hexdigest()[:12],
            notice=notice,
            progress=progress or (lambda _: None),
        ).run()
    return published(repo, outcome, private, None)


def _check_folder(folder: Path, notice: Notice) -> None:
    """SourceError unless the folder is what its manifest says."""
    from merge.verify import verify

    if not folder.is_dir():
        raise SourceError("there is no such folder", folder=folder)
    found = verify(folder)
    if not found.ok:
        raise SourceError(
            "the folder is not what was written, and is not published",
            folder=folder,
            found="; ".join(found.problems[:3]),
            do="make it anew, or look at all problems with `merge verify`",
        )
    if found.plan is None:
        notice(f"{folder} has no manifest: its headers were checked, but no bytes")


def _files(folder: Path) -> list[Path]:
    """The files of a folder, without hidden ones and what lies in hidden folders."""
    return [
        p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(x.startswith(".") for x in p.relative_to(folder).parts)
    ]
