"""Objectives that a task brings with it, or its user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.learning.objectives.view import Needs, View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Criterion", "Own"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """The task's own criterion, of output and target."""

    needs: Needs = "labels"
    layer: None = None

    def recall(self, view: View) -> Any:
        return None

    def loss(self, view: View) -> Tensor:
        found: Tensor = view.task.criterion(view.out, view.target)
        return found


@dataclass(frozen=True, slots=True)
class Own:
    """A function of the user's: (out, (inputs, target), task, what the expert returned) -> loss."""

    function: Callable[[Any, tuple[Any, Any], Any, Any], Tensor]
    needs: Needs = "inputs"
    layer: None = None

    def recall(self, view: View) -> Any:
        return _plain(view.out)

    def loss(self, view: View) -> Tensor:
        return self.function(view.out, (view.inputs, view.target), view.task, view.expert)


def _plain(out: Any) -> Any:
    """A model's output as plain mappings and tuples of tensors."""
    import torch

    if isinstance(out, torch.Tensor):
        return out.detach()
    if isinstance(out, Mapping):
        return {k: _plain(v) for k, v in out.items()}
    if isinstance(out, tuple | list):
        return tuple(_plain(v) for v in out)
    return out
