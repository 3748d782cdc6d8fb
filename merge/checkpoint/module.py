"""A live module as a checkpoint, and what transformers calls its tensors in files.

transformers 5 holds many models under other names than it stores them, and experts in one tensor
that it stores apart. Its own table is asked for the names, once they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge.checkpoint.memory import open_state_dict
from merge.ir.checkpoint import Checkpoint
from merge.ir.side import Side

if TYPE_CHECKING:
    import torch

__all__ = ["open_module"]


def open_module(module: Any) -> Checkpoint:
    """The tensors of ``module``, under the names of its state dict; nothing is copied."""
    state = module.state_dict()
    opened = open_state_dict(state, f"{type(module).__name__} #{id(module):x}", _side(module))
    if not _of_transformers(module):
        return opened
    return replace(opened, stored=lambda: _stored_names(module, state))


def _side(module: Any) -> Side:
    """The config of a transformers model, so that `save` can write it."""
    to_dict = getattr(getattr(module, "config", None), "to_diff_dict", None)
    return Side(config=dict(to_dict())) if callable(to_dict) else Side()


def _of_transformers(module: object) -> bool:
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.")
        for c in type(module).__mro__
    )


def _stored_names(module: Any, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """From names in files to those in memory, for tensors that are the same in both.

    The table is made for tensors without data, which come out under the names of files. What is
    made of several tensors has no name of its own; {} for versions of transformers without a table.
    """
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    empty = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in state.items()}
    name_of = {id(tensor): name for name, tensor in empty.items()}
    found = revert_weight_conversion(module, dict(empty)).items()
    return {file: name_of[id(tensor)] for file, tensor in found if id(tensor) in name_of}
