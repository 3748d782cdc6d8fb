"""How sure a classifier is of what it answers, and how far it may be: calibration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Confidence", "confidence"]

_BINS = 15


@dataclass(frozen=True, slots=True)
class Confidence:
    """Of a classifier on labelled examples.

    accuracy: share that is right. mean: mean probability of the answer. error: the expected
    calibration error (Guo et al. 2017, arXiv:1706.04599), sum over 15 bins of equal width of the
    share of examples times |accuracy - confidence| there. loss: mean negative log-likelihood.
    temperature: what the logits are best divided by, for the least loss; above 1, the classifier is
    too sure of itself, and outvotes the other member of an average of weights.
    """

    accuracy: float
    mean: float
    error: float
    loss: float
    temperature: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def confidence(logits: Tensor, labels: Tensor) -> Confidence:
    """Calibration of logits (examples, classes) against labels (examples,), in float64."""
    import torch
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    logits, labels = logits.detach().double().cpu(), labels.cpu().long()
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise PlanError(
            "there is not one label for each row of logits",
            found=f"logits {list(logits.shape)}, labels {list(labels.shape)}",
            expected="(examples, classes) and (examples,)",
        )
    shares, answers = logits.softmax(-1).max(-1)
    right = (answers == labels).double()
    bins = (shares * _BINS).ceil().long().sub_(1).clamp_(0, _BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, right - shares)

    def loss(log_temperature: float) -> float:
        scaled = logits / float(torch.tensor(log_temperature).exp())
        return float(torch.nn.functional.cross_entropy(scaled, labels))

    best = minimize_scalar(loss, bounds=(-5.0, 5.0), method="bounded")
    return Confidence(
        accuracy=float(right.mean()),
        mean=float(shares.mean()),
        error=float(gaps.abs().sum() / len(labels)),
        loss=loss(0.0),
        temperature=float(torch.tensor(best.x).exp()),
    )
