"""Open a model by the name that people give it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge.checkpoint.adapter import is_adapter, no_such_adapter, open_adapter, with_adapter
from merge.checkpoint.folder import no_such_model, open_files, open_path
from merge.checkpoint.place import Files, LocalFiles
from merge.errors import MergeError, SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference

__all__ = ["files_of", "open_folder", "open_reference"]


def open_reference(reference: Reference, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint of that name; what exists under the whole text goes before its parts.

    A folder or a file here goes before a repo on the Hub.
    """
    if _exists(whole := str(reference)):
        reference = Reference(whole, architecture=reference.architecture)
    if reference.revision is not None and _exists(reference.path):
        raise _no_revisions(reference, reference.revision, reference.path)
    opened = _open(reference.path, reference.revision, allow_pickle)
    if reference.adapter is not None:
        opened = _with(opened, reference, allow_pickle)
    return replace(opened, side=opened.side.with_architecture(reference.architecture))


def open_folder(path: str, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint at a path; one written with backslashes is read as Windows would.

    An adapter is opened on the base that it names.
    """
    return _open(path, None, allow_pickle)


def files_of(reference: Reference) -> Files:
    """The files of a folder here, or of a repo on the Hub; SourceError where there is neither."""
    found = _path(str(reference))
    if found.is_dir():
        return LocalFiles.of(found)
    remote = _remote(reference.path, reference.revision)
    if remote is None:
        raise no_such_model(str(reference))
    return remote


def _open(
    path: str, revision: str | None, allow_pickle: bool, above: tuple[str, ...] = ()
) -> Checkpoint:
    """A model by its path or its id. above: adapters that led here."""
    called = path if revision is None else f"{path}@{revision}"
    try:
        found = _path(called)
        if found.is_file():
            return open_path(found, allow_pickle=allow_pickle)
        files: Files
        if found.is_dir():
            files, beside = LocalFiles.of(found), found
        elif (remote := _remote(path, revision)) is not None:
            files, beside = remote, None
        else:
            raise no_such_model(called)
        if not is_adapter(files):
            return open_files(files, called, allow_pickle=allow_pickle)
        if files.identity in above:
            raise SourceError("an adapter is its own base", model=called, found=" -> ".join(above))

        def base(name: str, revision: str | None) -> Checkpoint:
            near = None if beside is None else beside / Path(name).expanduser()
            if near is not None and near.exists():
                name, revision = str(near), None
            elif _exists(name):
                revision = None
            return _open(name, revision, allow_pickle, (*above, files.identity))

        return open_adapter(files, base, allow_pickle=allow_pickle)
    except (OSError, RuntimeError, ValueError) as error:
        raise no_such_model(called, getattr(error, "strerror", None) or error) from None


def _with(base: Checkpoint, reference: Reference, allow_pickle: bool) -> Checkpoint:
    """``base`` with the reference's adapter."""
    path = _path(str(reference.adapter))
    if reference.adapter_revision is not None and path.exists():
        raise _no_revisions(reference, reference.adapter_revision, path)
    try:
        files: Files | None = LocalFiles.of(path) if path.is_dir() else None
        files = files or _remote(str(reference.adapter), reference.adapter_revision)
        if files is None:
            raise no_such_adapter(path)
        return with_adapter(base, files, allow_pickle=allow_pickle)
    except MergeError as error:
        raise error.at(reference=reference) from None


def _remote(path: str, revision: str | None) -> Files | None:
    """The files of a repo on the Hub; None for what has not the shape of an id.

    ``org/name``, ``hf://org/name`` and, for a folder in the repo, ``hf://org/name/folder``.
    """
    from merge.checkpoint.remote import HubFiles
    from merge.hub import SCHEME, current, is_hub_id

    plain = path.removeprefix(SCHEME)
    repo, folder = "/".join(plain.split("/")[:2]), "/".join(plain.split("/")[2:])
    if not is_hub_id(repo) or (folder and plain == path):
        return None
    try:
        return HubFiles.of(current(), repo, revision, folder)
    except SourceError as error:
        if plain == path and error.what.startswith("no such model"):
            error.what = "no such model: no folder here has that name, and no repo on the Hub"
            error.args = (error.what,)
        raise error.at(model=path) from None


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
