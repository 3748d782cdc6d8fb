"""Sources: where checkpoints come from. ``open`` is the one way in."""

from __future__ import annotations

import os
from collections.abc import Mapping

from merge.checkpoint.folder import no_such_model
from merge.checkpoint.reference import open_folder, open_reference
from merge.errors import SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference, parse_reference

__all__ = ["open_checkpoint"]


def open_checkpoint(source: object, *, allow_pickle: bool = False) -> Checkpoint:
    """A lazy checkpoint over ``source``; only headers are read.

    source: a folder or ``.safetensors`` file (Path, text or reference), a state dict, a
    ``torch.nn.Module`` (its ``config``, if it has one, becomes config.json), or a checkpoint, which
    is returned as it is. allow_pickle: read torch's pickles too, by its weights-only reader.
    Raises SourceError for anything missing, damaged or not to be trusted.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Reference):
        return open_reference(source, allow_pickle=allow_pickle)
    if isinstance(source, str):
        try:
            return open_reference(parse_reference(source), allow_pickle=allow_pickle)
        except ValueError as error:
            raise no_such_model(source, error) from None
    if isinstance(source, os.PathLike):
        return open_folder(os.fspath(source), allow_pickle=allow_pickle)
    if isinstance(source, Mapping):
        from merge.checkpoint.memory import open_state_dict

        return open_state_dict(source)
    if hasattr(source, "state_dict"):
        from merge.checkpoint.module import open_module

        return open_module(source)
    raise SourceError(
        "cannot open this as a checkpoint",
        found=type(source).__name__,
        expected="a path, a state dict, an nn.Module or a checkpoint",
    )
