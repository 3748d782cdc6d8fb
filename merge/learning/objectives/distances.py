"""Distances between what the merged model and a task's expert answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from merge.errors import PlanError
from merge.learning.objectives.view import Needs, View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Distill", "Features"]


@dataclass(frozen=True, slots=True)
class Distill:
    """Distance to the expert's scores of classes.

    kind ``kl``: T^2 KL(expert || merged) at temperature T. ``mse``: mean square of the difference,
    over the ``top`` highest scores of the expert, or all.
    """

    kind: Literal["kl", "mse"] = "kl"
    temperature: float = 1.0
    top: int | None = None
    needs: Needs = "expert"
    layer: None = None

    def recall(self, view: View) -> Any:
        return view.to_logits(view.out)

    def loss(self, view: View) -> Tensor:
        import torch.nn.functional as F  # noqa: N812

        logits = view.logits
        expert = view.expert.reshape(-1, logits.shape[-1])
        if self.kind == "mse":
            if self.top is not None and self.top < expert.shape[-1]:
                at = expert.topk(self.top, -1).indices
                logits, expert = logits.gather(-1, at), expert.gather(-1, at)
            return F.mse_loss(logits, expert)
        ours, theirs = ((x / self.temperature).log_softmax(-1) for x in (logits, expert))
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@dataclass(frozen=True, slots=True)
class Features:
    """Distance to the expert's features, at a named layer or, without one, of the output itself.

    kind: ``cosine`` (1 - cos of each row), ``l1`` or ``mse`` (means over all entries).
    """

    kind: Literal["cosine", "l1", "mse"] = "cosine"
    layer: str | None = None
    needs: Needs = "expert"

    def _of(self, view: View) -> Tensor:
        found = view.features if self.layer is not None else view.out
        found = found[0] if isinstance(found, tuple) else found
        if not hasattr(found, "reshape"):
            raise PlanError(
                "features are not a tensor",
                task=view.name,
                layer=self.layer,
                found=type(found).__name__,
                do="name a layer whose output is a tensor",
            )
        tensor: Tensor = found
        return tensor

    def recall(self, view: View) -> Any:
        return self._of(view)

    def loss(self, view: View) -> Tensor:
        import torch.nn.functional as F  # noqa: N812

        ours, theirs = self._of(view), view.expert
        if self.kind == "l1":
            return F.l1_loss(ours, theirs)
        if self.kind == "mse":
            return F.mse_loss(ours, theirs)
        return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()
