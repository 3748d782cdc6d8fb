"""What takes part in a training run: called by a plain loop, or by a trainer through an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Callback", "Every"]


class Callback:
    """Does nothing at any point of a run; others do something at some."""

    def begin(self, module: nn.Module, optimizer: Any = None) -> None:
        """Before the first step."""

    def step(self, module: nn.Module, step: int) -> None:
        """After the ``step``-th step of the optimiser, counted from 1."""

    def epoch(self, module: nn.Module, epoch: int) -> None:
        """After the ``epoch``-th epoch, counted from 1."""

    def end(self, module: nn.Module) -> None:
        """After the last step."""


class Every(Callback):
    """Acts after every so many steps or epochs, from a start on."""

    def __init__(self, every: int = 1, on: str = "epoch", start: int = 1) -> None:
        from merge.errors import RecipeError

        if on not in ("step", "epoch"):
            raise RecipeError("no such time", key="on", found=repr(on), expected="step or epoch")
        if every < 1:
            raise RecipeError("too seldom", key="every", found=every, expected="1 or more")
        self.every, self.on, self.start = every, on, start

    def act(self, module: nn.Module) -> None:
        """What is done each time."""
        raise NotImplementedError

    def step(self, module: nn.Module, step: int) -> None:
        """Acts, if it acts on steps and it is time."""
        if self.on == "step" and self._due(step):
            self.act(module)

    def epoch(self, module: nn.Module, epoch: int) -> None:
        """Acts, if it acts on epochs and it is time."""
        if self.on == "epoch" and self._due(epoch):
            self.act(module)

    def _due(self, count: int) -> bool:
        return count >= self.start and count % self.every == 0
