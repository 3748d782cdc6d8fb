"""The difference that a run has made, saved and published when it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from merge.checkpoint import open_checkpoint
from merge.families.reconcile import reconcile
from merge.training.callback import Callback

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__all__ = ["PushDelta"]


class PushDelta(Callback):
    """Saves the difference of the trained network to its base, and hands its folder to ``push``.

    base: what the run began with, as `merge.open` takes it. folder: where the difference is saved;
    `merge.open` reads it as one, and ``base + difference`` is the network again. dtype: of the
    saved numbers, by default the widest of both. push: called with the folder, such as one that
    uploads it; None only saves.
    """

    def __init__(
        self,
        base: object,
        folder: str | Path,
        *,
        push: Callable[[Path], object] | None = None,
        dtype: str | None = None,
        replace: bool = False,
    ) -> None:
        self.base, self.folder, self.push = base, folder, push
        self.dtype, self.replace = dtype, replace
        self.result: Any = None

    def end(self, module: nn.Module) -> None:
        """Save the difference and push it; ``result`` is what the push returned."""
        base, tuned = reconcile([open_checkpoint(self.base), open_checkpoint(module)])
        saved = (tuned - base).save(self.folder, dtype=self.dtype, card=False, replace=self.replace)
        if self.push is not None:
            self.result = self.push(saved)
