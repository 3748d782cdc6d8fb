"""Between an old checkpoint and a new one: the most accurate that keeps what the old one could."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.analysis.interpolation import Interpolation, along_line
from merge.api import method_function
from merge.api import open as open_any
from merge.errors import PlanError
from merge.families.reconcile import reconcile
from merge.ir.checkpoint import Checkpoint
from merge.placing import placed
from merge.tasks import open_data

if TYPE_CHECKING:
    from torch import Tensor

    from merge.analysis.task import Task

__all__ = ["Interpolated", "interpolate"]


@dataclass(frozen=True, slots=True, eq=False)
class Interpolated:
    """The chosen checkpoint, not yet computed, and what was found along the line."""

    checkpoint: Checkpoint
    report: Interpolation


def interpolate(
    old: object,
    new: object,
    data: str | Task,
    *,
    alphas: Sequence[float] = (),
    max_flips: float | None = None,
    statistics: Sequence[object] = (),
) -> Interpolated:
    """The checkpoint between ``old`` and ``new`` that is most accurate on a task's test batches.

    alphas: points between 0 (old) and 1 (new); by default every twentieth. max_flips: the share of
    examples that the old model has right and the result may have wrong (backward compatible weight
    interpolation, arXiv:2301.10546). statistics: Fisher information of both, old first: each weight
    then moves as far as its own information says. Both models are in memory.
    """
    before, after = reconcile([open_any(old), open_any(new)])
    task = open_data(data, after, before)
    if not task.test:
        raise PlanError("there is no data to judge by", found="no test batches")
    known = [open_any(s) for s in statistics]
    ends = [placed(task, c).state() for c in (before, after)]
    labels = _labels(task)

    def mixed(alpha: float) -> Checkpoint:
        if alpha in (0.0, 1.0):
            return after if alpha else before
        if known:
            return method_function("fisher")(
                [before, after], statistics=known, weight=[1.0 - alpha, alpha]
            )
        return before + alpha * (after - before)

    def between(alpha: float) -> Mapping[str, Tensor]:
        import torch

        if known:
            return placed(task, mixed(alpha)).state()
        pairs = zip(ends[0].items(), ends[1].values(), strict=True)
        return {n: torch.lerp(a, b, alpha) if a.is_floating_point() else b for (n, a), b in pairs}

    line = tuple(alphas) or tuple(i / 20 for i in range(21))
    report = along_line(between, lambda s: _answers(task, s), labels, line, max_flips)
    return Interpolated(mixed(report.chosen.alpha), report)


def _answers(task: Task, state: Mapping[str, Tensor]) -> Tensor:
    """Logits of all test batches."""
    import torch

    found = []
    with torch.no_grad():
        for inputs, _ in task.test:
            out: Any = task.output(state, inputs)
            own = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
            logits = own if task.logits is None else task.logits(out)
            if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
                raise PlanError(
                    "the network's output shows no answers to be judged",
                    found=type(out).__name__,
                    expected="logits, (examples, classes)",
                )
            found.append(logits)
    return torch.cat(found)


def _labels(task: Task) -> Tensor:
    import torch

    labels = [target for _, target in task.test]
    if not all(isinstance(t, torch.Tensor) and t.ndim == 1 for t in labels):
        raise PlanError(
            "the targets are no labels", found=type(labels[0]).__name__, expected="(examples,)"
        )
    return torch.cat(labels)
