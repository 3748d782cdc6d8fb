"""Objectives of classifiers that need no labels: an expert's own, or none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from merge.learning.objectives.view import Needs, View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Entropy", "PseudoLabels"]


@dataclass(frozen=True, slots=True)
class PseudoLabels:
    """Cross-entropy against the class that the task's expert chooses.

    gate: which rows count. ``none``: all. ``confidence``: those of which the expert is at least as
    sure as ``least``, and, where merged model and expert disagree, at least as sure as the merged
    model (the rule of Model Tinting++). Where no row passes, the loss is zero.
    """

    gate: Literal["none", "confidence"] = "confidence"
    least: float = 0.0
    needs: Needs = "expert"
    layer: None = None

    def recall(self, view: View) -> Any:
        sure, label = view.logits.softmax(-1).max(-1)
        return {"label": label, "sure": sure}

    def loss(self, view: View) -> Tensor:
        import torch.nn.functional as F  # noqa: N812

        logits = view.logits
        label, sure = view.expert["label"].reshape(-1), view.expert["sure"].reshape(-1)
        each = F.cross_entropy(logits, label, reduction="none")
        if self.gate == "none":
            return each.mean()
        mine, chosen = logits.detach().softmax(-1).max(-1)
        kept = (sure >= self.least) & ((chosen == label) | (sure >= mine))
        found: Tensor = (each * kept).sum() / kept.sum().clamp_min(1)
        return found


@dataclass(frozen=True, slots=True)
class Entropy:
    """The mean Shannon entropy of the merged model's answers, which asks for sure ones.

    normalise: divide by the log of the number of classes, so that tasks of few classes do not
    weigh less. diversity: this weight times the entropy of the mean answer is taken off, so that
    not all rows end in one class. temperature: of the softmax. Sure is not right: started far from
    a good merge, it ends below where it began.
    """

    normalise: bool = False
    diversity: float = 0.0
    temperature: float = 1.0
    needs: Needs = "inputs"
    layer: None = None

    def recall(self, view: View) -> Any:
        return None

    def loss(self, view: View) -> Tensor:
        logs = (view.logits / self.temperature).log_softmax(-1)
        found = -(logs.exp() * logs).sum(-1).mean()
        if self.diversity:
            mean = logs.exp().mean(0)
            found = found + self.diversity * (mean * mean.clamp_min(1e-12).log()).sum()
        return found / math.log(logs.shape[-1]) if self.normalise else found
