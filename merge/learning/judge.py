"""Scores on held-out data, and the choice among candidates by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import MergeError, PlanError, ScoreError, told
from merge.learning.coefficients import Coefficients
from merge.learning.network import Job
from merge.learning.objectives import (
    Features,
    LanguageModel,
    Negation,
    Objective,
    View,
    labels_of,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Candidate", "Judge"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A merge that was scored: each task's score on validation data, and their mean.

    allowed: False where it breaks a floor, and so is not chosen whatever its score.
    """

    name: str
    score: float
    tasks: Mapping[str, float]
    allowed: bool = True
    coefficients: Coefficients | None = None


class Judge:
    """Scores merged tensors on the tasks' validation data.

    A task with labels is scored by the share that is right; one without by the share on which
    merged model and expert choose the same class. One without classes is scored by its negative
    loss, as is one whose objective is about no classes: features of the output itself, or language.
    With a negation what is to be forgotten counts against a candidate.
    """

    def __init__(self, jobs: Sequence[Job], objective: Objective) -> None:
        self.jobs = [j for j in jobs if j.validate is not None]
        self.objective = objective
        self.experts: dict[tuple[str, int], Any] = {}
        output = isinstance(objective, Features) and not objective.layer
        self.classless = output or isinstance(objective, LanguageModel)
        self.floors: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self.jobs)

    def wants_expert(self, job: Job) -> bool:
        """Whether scoring a task takes its expert's choices."""
        if job.validate is None or job.teacher is None:
            return False
        if self.classless and self.objective.needs != "expert":
            return False
        return any(job.validate.batch(i)[1] is None for i in range(min(1, len(job.validate))))

    def learn_expert(self, job: Job, theta: Mapping[str, Tensor]) -> None:
        """Note what the task's expert, which ``theta`` holds, chooses on its validation data."""
        import torch

        assert job.validate is not None
        with torch.no_grad():
            for number in range(len(job.validate)):
                inputs, target = job.validate.batch(number)
                view = job.view(theta, inputs, target, layer=self.objective.layer, plain=True)
                known = self.objective.recall(view) if self.classless else _chosen(job, view)
                self.experts[job.name, number] = known

    def candidate(
        self, name: str, theta: Mapping[str, Tensor], coefficients: Coefficients | None = None
    ) -> Candidate:
        """The scores of the merged tensors ``theta``."""
        scores = {job.name: self._score(job, theta) for job in self.jobs}
        if not isinstance(self.objective, Negation):
            mean = math.fsum(scores.values()) / len(scores)
            return Candidate(name, mean, scores, True, coefficients)
        lost = [j.name for j in self.jobs if self.objective.forgets(j.name, j.teacher is not None)]
        kept = [n for n in scores if n not in lost]
        mean = -math.fsum(scores[n] for n in lost) / max(1, len(lost))
        if name == "base":
            self.floors = {n: self.objective.floor * scores[n] for n in kept}
        allowed = all(scores[n] >= self.floors.get(n, -math.inf) for n in kept)
        return Candidate(name, mean, scores, allowed, coefficients)

    def settle(self, trials: Sequence[Candidate]) -> None:
        """Take the floors of a negation from scores of an earlier run."""
        for trial in trials:
            if trial.name == "base" and isinstance(self.objective, Negation):
                self.floors = {n: self.objective.floor * s for n, s in trial.tasks.items()}

    def _score(self, job: Job, theta: Mapping[str, Tensor]) -> float:
        import torch

        assert job.validate is not None
        total, rows = 0.0, 0
        with torch.no_grad():
            for number, size in enumerate(job.validate.sizes):
                inputs, target = job.validate.batch(number)
                view = job.view(theta, inputs, target, layer=self.objective.layer)
                try:
                    total += size * self._share(job, view, number)
                except MergeError as error:
                    raise error.at(task=job.name) from None
                rows += size
        found = total / rows
        if math.isnan(found):
            raise ScoreError("a validation score is not a number", task=job.name)
        return found

    def _share(self, job: Job, view: View, number: int) -> float:
        """The share of a batch that is right, or its negative loss."""
        import torch

        target = view.target
        if target is None and self.classless:
            view.expert = self.experts.get((job.name, number))
            return -float(job.loss(self.objective, view).detach())
        if target is None and job.teacher is None:
            raise PlanError(
                "a task's validation data has no labels, and the task no expert to go by",
                task=job.name,
                do="give labels, or name the task as its expert",
            )
        if target is None:
            chosen = _chosen(job, view)
            return float((chosen == self.experts[job.name, number]).float().mean())
        try:
            labels = isinstance(target, torch.Tensor) and not target.is_floating_point()
            logits = view.to_logits(view.out) if labels and job.task.has_labels else None
            shape = () if logits is None else tuple(logits.shape)
            if logits is not None and shape[:-1] == (target.numel(),) and shape[-1] > 1:
                target = labels_of(view, logits.shape[-1])
                if job.task.right is None:
                    return float((logits.argmax(-1) == target).float().mean())
            if job.task.right is not None:
                return float(job.task.right(view.out, view.target))
            return -float(job.loss(self.objective, view).detach())
        except MergeError:
            raise
        except Exception as error:  # the user's own functions
            raise ScoreError("a task cannot be scored", task=job.name, found=told(error)) from error


def _chosen(job: Job, view: View) -> Tensor:
    """The class that the model chooses for each row."""
    try:
        return view.logits.argmax(-1)
    except MergeError as error:
        raise error.at(task=job.name) from None
