"""Open a model by the name that people give it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge.checkpoint.adapter import is_adapter, open_adapter, with_adapter
from merge.checkpoint.folder import no_such_model, open_path
from merge.checkpoint.place import LocalFiles
from merge.errors import MergeError, SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference

__all__ = ["open_folder", "open_reference"]


def open_reference(reference: Reference, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint of that name; what exists under the whole text goes before its parts."""
    if _exists(whole := str(reference)):
        reference = Reference(whole, architecture=reference.architecture)
    if reference.revision is not None and _exists(reference.path):
        raise _no_revisions(reference, reference.revision, reference.path)
    path = reference.path
    if reference.revision is not None:
        path = f"{path}@{reference.revision}"
    opened = open_folder(path, allow_pickle=allow_pickle)
    if reference.adapter is not None:
        opened = _with(opened, reference, allow_pickle)
    return replace(opened, side=opened.side.with_architecture(reference.architecture))


def _with(base: Checkpoint, reference: Reference, allow_pickle: bool) -> Checkpoint:
    """``base`` with the reference's adapter."""
    path = _path(str(reference.adapter))
    if reference.adapter_revision is not None and path.exists():
        raise _no_revisions(reference, reference.adapter_revision, path)
    try:
        return with_adapter(base, LocalFiles.of(path), allow_pickle=allow_pickle)
    except MergeError as error:
        raise error.at(reference=reference) from None


def open_folder(
    path: str, *, allow_pickle: bool = False, above: tuple[str, ...] = ()
) -> Checkpoint:
    """The checkpoint at a path; one written with backslashes is read as Windows would.

    An adapter is opened on the base that it names. above: adapters that led here.
    """
    try:
        found = _path(path)
        files = LocalFiles.of(found)
        if not is_adapter(files):
            return open_path(found, allow_pickle=allow_pickle)
        if files.identity in above:
            raise SourceError("an adapter is its own base", model=path, found=" -> ".join(above))

        def base(name: str, revision: str | None) -> Checkpoint:
            beside = found / Path(name).expanduser()
            if beside.exists():
                name, revision = str(beside), None
            if revision is None or _exists(name):
                inner = (*above, files.identity)
                return open_folder(name, allow_pickle=allow_pickle, above=inner)
            return open_reference(Reference(name, revision), allow_pickle=allow_pickle)

        return open_adapter(files, base, allow_pickle=allow_pickle)
    except (OSError, RuntimeError, ValueError) as error:
        raise no_such_model(path, getattr(error, "strerror", None) or error) from None


def _path(path: str) -> Path:
    if "\\" in path and not _exists(path):
        path = path.replace("\\", "/")
    return Path(path).expanduser()


def _no_revisions(reference: Reference, revision: str, path: object) -> SourceError:
    return SourceError(
        "a folder has no revisions",
        model=reference,
        found=f"revision {revision!r} of {path}",
        do="leave the revision out, or name the folder that holds it",
    )


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
