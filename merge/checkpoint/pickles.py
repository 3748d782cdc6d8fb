"""Weights in torch's pickles, opened without reading them and without running what they say.

torch's weights-only reader makes the tensors on the meta device: it reads the small pickle that
lists them, and each storage then says at which byte of the file its data lies. From then on a
pickle is read as a safetensors file is, by position and without torch. The reader builds tensors
and plain containers and calls nothing else; holes found in it before were closed in torch 2.10.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO

from merge.checkpoint.archive import check_archive
from merge.checkpoint.header import Header, check_regular, is_tensor_name
from merge.checkpoint.placed import StateDict, header_in_file, header_in_memory
from merge.errors import SourceError
from merge.ir.checkpoint import some
from merge.ir.expr import InputFile

if TYPE_CHECKING:
    import torch

__all__ = ["read_pickle", "read_pickle_from"]

_ZIP = b"PK\x03\x04"
_OLD = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the number that torch wrote before 1.6
_MAX_OLD = 16_000_000_000  # bytes of a file of that format, which is held whole in memory
_SAFE = (2, 10)  # of torch: the first whose reader has no hole that is known


def read_pickle(path: Path) -> Header:
    """What the pickle ``path`` holds; SourceError for anything but a state dict of dense tensors.

    A dict with the state dict under one key (``state_dict``, ``model``, ...) is taken for it; what
    lies beside is named as dropped. A file of the format before torch 1.6 says not where its
    tensors lie: it is loaded whole, and a note says so.
    """
    info = check_regular(path)
    try:
        with path.open("rb") as f:
            return read_pickle_from(f, InputFile(str(path), info.st_size, info.st_mtime_ns))
    except OSError as error:
        raise SourceError(f"a weight file cannot be read: {error.strerror}", file=path) from None


def read_pickle_from(f: BinaryIO, file: InputFile) -> Header:
    """The same of a file that is open, wherever it lies."""
    _check_torch()
    head = f.read(2 + len(_OLD))
    f.seek(0)
    if head.startswith(_ZIP):
        records = check_archive(f, file.path, file.size)
        f.seek(0)
        return header_in_file(_state_dict(_load(f, file.path, "meta"), file.path), file, records)
    _check_old(head, file)
    return header_in_memory(_state_dict(_load(f, file.path, "cpu"), file.path), file)


def _check_old(head: bytes, file: InputFile) -> None:
    """A file that is no archive begins as torch began them before 1.6, and fits in memory."""
    if head[2:] != _OLD:
        raise SourceError(
            "not a file of torch.save",
            file=file.path,
            found=f"the first bytes {head[:8].hex(' ')}" if head else "an empty file",
            expected="a zip archive, or torch's format before 1.6",
            do="the file may be cut off or of another program: fetch or convert it again",
        )
    if file.size > _MAX_OLD:
        raise SourceError(
            "too large a file of torch's format before 1.6, which is held whole in memory",
            file=file.path,
            found=f"{file.size} bytes",
            expected=f"at most {_MAX_OLD} bytes",
            do="load it with torch.load(..., weights_only=True) and save it as safetensors",
        )


def _check_torch() -> None:
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE:
        raise SourceError(
            "this version of torch reads pickles with a hole that later ones have closed",
            found=f"torch {torch.__version__}",
            expected=f"torch {_SAFE[0]}.{_SAFE[1]} or later",
            do="update torch, or convert the weights to safetensors",
        )


def _load(f: BinaryIO, path: str, place: str) -> object:
    """The object in the file; tensors are at ``place``, and nothing but tensors is made."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is an error
            loaded: object = torch.load(f, map_location=place, weights_only=True)
            return loaded
    except MemoryError:
        raise SourceError("the pickle asks for more memory than there is", file=path) from None
    except Exception as error:  # of a pickle that may say anything, anything may be the matter
        raise _refused(error, path) from None


def _refused(error: Exception, path: str) -> SourceError:
    """What torch's reader would not do. Its own text, which invites to do it all the same, goes."""
    cause = error.__context__ if isinstance(error.__context__, pickle.UnpicklingError) else error
    wanted = re.search(r"GLOBAL ([\w.]+)", str(cause))
    if wanted is not None:
        return SourceError(
            "the pickle holds more than tensors, and is not opened",
            file=path,
            found=f"it asks for {wanted[1]}",
            expected="tensors and plain containers",
            do="if you trust who made it, load it where it was made and save the state dict alone,"
            " as safetensors",
        )
    line = str(cause).strip().partition("\n")[0][:200]
    return SourceError(
        "the pickle cannot be read",
        file=path,
        found=line or type(cause).__name__,
        expected="a state dict, as torch.save writes it",
        do="the file may be damaged: fetch it again, or save the state dict as safetensors",
    )


def _state_dict(loaded: object, path: str) -> StateDict:
    """The state dict that was saved, alone or under one key of a dict."""
    import torch

    if not isinstance(loaded, Mapping):
        raise SourceError(
            "the pickle holds no state dict",
            file=path,
            found=type(loaded).__name__,
            expected="a dict from names to tensors",
            do="save model.state_dict() as safetensors",
        )
    outer = [k for k, v in loaded.items() if isinstance(v, torch.Tensor)]
    inner = [k for k, v in loaded.items() if _is_state(v)]
    if inner:  # single numbers beside it, such as a best score, are no weights
        outer = [k for k in outer if loaded[k].numel() > 1]
    if inner and (outer or len(inner) > 1):
        raise SourceError(
            "the pickle holds several sets of tensors",
            file=path,
            found=some([*(["tensors at the top"] if outer else []), *map(_shown, inner)]),
            expected="one state dict, alone or under one key",
            do="save the one that is meant as safetensors",
        )
    if not outer and not inner:
        raise SourceError(
            "the pickle holds no tensors",
            file=path,
            found=some([_shown(k) for k in loaded]) or "an empty dict",
            expected="a dict from names to tensors, alone or under one key such as state_dict",
        )
    state = loaded[inner[0]] if inner else loaded
    dropped = {
        _shown(k): f"it lies beside {_shown(inner[0])!r} in {PurePath(path).name}"
        for k in loaded
        if inner and k != inner[0]
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            dropped[_shown(name)] = f"it is no tensor in {PurePath(path).name}"
            continue
        if not isinstance(name, str) or not is_tensor_name(name):
            raise SourceError(
                "a tensor's name is no text, empty, too long or holds control characters",
                file=path,
                tensor=_shown(name),
            )
        tensors[name] = value
    return StateDict(tensors, dropped)


def _is_state(value: object) -> bool:
    """Whether this is a dict from names to tensors, perhaps with other things among them."""
    import torch

    return isinstance(value, Mapping) and any(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items()
    )


def _shown(key: object) -> str:
    """A key of a stranger's dict: text as it is, of anything else the type alone."""
    text = key if isinstance(key, str) else f"a key of type {type(key).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."
