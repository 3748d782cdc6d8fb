"""The line from an old network to a new one: accuracy, and answers that were right and are not.

WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903) takes a point between the pre-trained and the
fine-tuned weights; backward compatible weight interpolation (Schumann et al. 2023,
arXiv:2301.10546) the most accurate one that keeps what the old network could.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from merge.analysis.confidence import Confidence, confidence
from merge.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Interpolation", "Point", "along_line", "negative_flips"]

Answers = Callable[["Mapping[str, Tensor]"], "Tensor"]
"""From a network's tensors to logits (examples, classes), or to the answers (examples,)."""


@dataclass(frozen=True, slots=True)
class Point:
    """A network of the line, at ``alpha`` between the old one (0) and the new one (1).

    negative: share of examples that the old network had right and this one has wrong. positive: the
    other way round. confidence: where there are logits.
    """

    alpha: float
    accuracy: float
    negative: float
    positive: float
    confidence: Confidence | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Interpolation:
    """All points, the old network first, and which was chosen: under ``most`` negative flips."""

    points: tuple[Point, ...]
    chosen: Point
    most: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "chosen": self.chosen.alpha,
            "max_flips": self.most,
            "points": [p.to_json() for p in self.points],
        }

    def __str__(self) -> str:
        calibrated = self.points[0].confidence is not None
        lines = ["alpha  accuracy  neg. flips  pos. flips" + "  calibration  temp." * calibrated]
        for p in self.points:
            line = f"{p.alpha:5.2f}  {p.accuracy:8.2%}  {p.negative:10.2%}  {p.positive:10.2%}"
            if p.confidence is not None:
                line += f"  {p.confidence.error:11.4f}  {p.confidence.temperature:5.2f}"
            lines.append(line + (" <- chosen" if p == self.chosen else ""))
        if calibrated:
            lines += _advice(self.points[0], self.points[-1])
        return "\n".join(lines)


def _advice(old: Point, new: Point) -> list[str]:
    if old.confidence is None or new.confidence is None or new.confidence.temperature < 1.5:
        return []
    return [
        f"the new network is too sure of its answers (temperature {new.confidence.temperature:.2f},"
        f" the old one {old.confidence.temperature:.2f}), and so outweighs the old one on the way:",
        "label smoothing or mixup in the fine-tune helps (BANG), or logits divided by its"
        " temperature",
    ]


def negative_flips(old: Tensor, new: Tensor) -> float:
    """Share of examples that ``old`` has right and ``new`` has wrong; both are (examples,) bools.

    >>> import torch
    >>> negative_flips(torch.tensor([1, 1, 0, 0]) == 1, torch.tensor([1, 0, 1, 0]) == 1)
    0.25
    """
    return float((old & ~new).double().mean())


def along_line(
    between: Callable[[float], Mapping[str, Tensor]],
    answers: Answers,
    labels: Tensor,
    alphas: Sequence[float],
    most: float | None = None,
) -> Interpolation:
    """The networks ``between(alpha)``, judged; the most accurate of those under the bound.

    alphas: in rising order, 0 and 1 are added. most: negative flips, a share in [0, 1]; None does
    not bound them. The old network itself always keeps to it. Of equally accurate points the one
    with fewer negative flips is taken, then the one nearer to the old network.
    """
    if most is not None and not 0.0 <= most <= 1.0:
        raise RecipeError("a share is out of range", key="max_flips", found=most, expected="[0, 1]")
    line = sorted({0.0, 1.0, *map(float, alphas)})
    if line[0] < 0.0 or line[-1] > 1.0:
        raise RecipeError("alpha is out of range", key="alphas", found=line, expected="[0, 1]")
    if not len(labels):
        raise PlanError("there is no data to judge by", found="no labels")
    before: Tensor | None = None
    points = []
    for alpha in line:
        found = answers(between(alpha)).detach().cpu()
        own = found.argmax(-1) if found.ndim > 1 else found
        if own.shape != labels.shape:
            raise PlanError(
                "there is not one answer for each label",
                found=list(found.shape),
                expected=f"{len(labels)} answers, or rows of logits",
            )
        right = own == labels.cpu()
        before = right if before is None else before
        points.append(
            Point(
                alpha,
                float(right.double().mean()),
                negative_flips(before, right),
                negative_flips(right, before),
                confidence(found, labels) if found.ndim == 2 else None,
            )
        )
    allowed = [p for p in points if most is None or p.negative <= most]
    chosen = max(allowed, key=lambda p: (p.accuracy, -p.negative, -p.alpha))
    return Interpolation(tuple(points), chosen, most)
