"""A network run on batches of inputs, as it is used and not as it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["evaluating", "run"]


def run(module: nn.Module, batch: Any) -> Any:
    """The module on a batch: a mapping of keywords, a tuple of arguments, or the one argument."""
    import torch

    with torch.no_grad():
        if isinstance(batch, Mapping):
            return module(**batch)
        return module(*batch) if isinstance(batch, tuple) else module(batch)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode; each of its parts is put back as it was."""
    training = [part for part in module.modules() if part.training]
    if training:
        module.eval()
    try:
        yield
    finally:
        for part in module.modules():
            part.training = False
        for part in training:
            part.training = True
