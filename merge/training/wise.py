"""At the end of a fine-tune: the best point between its result and where it began."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from merge.analysis.interpolation import Interpolation, along_line
from merge.training.callback import Callback

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["WiseSweep", "twentieths"]


def twentieths() -> tuple[float, ...]:
    """0, 0.05, ... 1."""
    return tuple(i / 20 for i in range(21))


class WiseSweep(Callback):
    """Puts the most accurate network between the start and the end of a run into the module.

    start: the tensors that the run began with. answers: from the module to logits (examples,
    classes) or answers on held-out examples; called at each point. labels: of those examples.
    max_flips: share of them that the start had right and the result may have wrong. apply: put the
    chosen network into the module. ``report`` holds an `Interpolation` afterwards.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        answers: Callable[[nn.Module], Tensor],
        labels: Tensor,
        *,
        alphas: Sequence[float] = (),
        max_flips: float | None = None,
        apply: bool = True,
    ) -> None:
        self.start, self.answers, self.labels = start, answers, labels
        self.alphas = tuple(alphas) or twentieths()
        self.max_flips, self.apply = max_flips, apply
        self.report: Interpolation | None = None

    def end(self, module: nn.Module) -> None:
        """Try all points, and keep the chosen one."""
        import torch

        tuned = {n: t.detach().clone() for n, t in module.state_dict().items()}
        modes = {part: part.training for part in module.modules()}

        def between(alpha: float) -> dict[str, Tensor]:
            return {
                n: torch.lerp(self.start[n].to(t), t, alpha)
                if t.is_floating_point() and n in self.start
                else t
                for n, t in tuned.items()
            }

        def found(state: Mapping[str, Tensor]) -> Tensor:
            module.load_state_dict(dict(state))
            with torch.no_grad():
                return self.answers(module.eval())

        try:
            self.report = along_line(between, found, self.labels, self.alphas, self.max_flips)
        finally:
            module.load_state_dict(tuned)
            for part, training in modes.items():
                part.training = training
        if self.apply:
            module.load_state_dict(between(self.report.chosen.alpha))
