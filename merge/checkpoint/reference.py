"""Open a model by the name that people give it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge.checkpoint.folder import no_such_model, open_path
from merge.errors import SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference

__all__ = ["open_folder", "open_reference"]


def open_reference(reference: Reference, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint of that name; what exists under the whole text goes before its parts."""
    if _exists(whole := str(reference)):
        reference = Reference(whole, architecture=reference.architecture)
    if reference.adapter is not None:
        raise SourceError(
            "adapters are not merged into their base yet",
            model=reference,
            found=f"adapter {reference.adapter}",
            do="merge the adapter first, as with peft's merge_and_unload and save_pretrained",
        )
    if reference.revision is not None and _exists(reference.path):
        raise SourceError(
            "a folder has no revisions",
            model=reference,
            found=f"revision {reference.revision!r} of {reference.path}",
            do="leave the revision out, or name the folder that holds it",
        )
    path = reference.path if reference.revision is None else str(reference)
    opened = open_folder(path, allow_pickle=allow_pickle)
    return replace(opened, side=opened.side.with_architecture(reference.architecture))


def open_folder(path: str, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint at a path; one written with backslashes is read as Windows would."""
    if "\\" in path and not _exists(path):
        path = path.replace("\\", "/")
    try:
        return open_path(Path(path).expanduser(), allow_pickle=allow_pickle)
    except (OSError, RuntimeError, ValueError) as error:
        raise no_such_model(path, getattr(error, "strerror", None) or error) from None


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
