"""What experts answer to the data of their tasks: asked once, kept, and the experts are dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from merge.errors import MergeError, PlanError
from merge.learning.batches import nbytes_of
from merge.learning.judge import Judge
from merge.learning.network import Job, Network
from merge.learning.objectives import Objective, Own, PseudoLabels

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Answers"]


class Answers:
    """Experts' answers by task and batch. keep: bytes of them that are held at most."""

    def __init__(self, objective: Objective, keep: int) -> None:
        self.objective = objective
        self.keep = keep
        self.nbytes = 0
        self.notes: list[str] = []
        self._known: dict[tuple[str, int], Any] = {}

    def ask(
        self,
        jobs: Sequence[Job],
        judge: Judge,
        network: Network,
        teacher: Callable[[int, str], Tensor],
    ) -> None:
        """Run each task's expert, in the network's tensors, over what is learned and judged on.

        teacher: an expert's tensor, by its number and the tensor's name. PlanError for a task
        without an expert where the objective asks for one.
        """
        import torch

        for job in jobs:
            if self.objective.needs == "expert" and job.teacher is None:
                raise PlanError(
                    "a task has no expert to learn from",
                    task=job.name,
                    do="name the task as its expert, or take an objective that needs none",
                )
            learns = self.objective.needs == "expert" or isinstance(self.objective, Own)
            judges = judge.wants_expert(job)
            if job.teacher is None or not (learns or judges):
                continue
            network.load(partial(teacher, job.teacher))
            with torch.no_grad():
                if judges:
                    judge.learn_expert(job, network.theta)
                if learns:
                    self._note(job, network)
                    self._check_classes(job)

    def _check_classes(self, job: Job) -> None:
        """Note an expert that chooses one class on all data: there is nothing to tell apart."""
        if not isinstance(self.objective, PseudoLabels):
            return
        found: set[int] = set()
        for number in range(len(job.learn)):
            found.update(self._known[job.name, number]["label"].unique().tolist())
        if len(found) == 1 and sum(job.learn.sizes) > 1:
            self.notes.append(f"{job.name}: its expert chooses class {found.pop()} on all its data")

    def _note(self, job: Job, network: Network) -> None:
        """Keep what the objective wants of the expert's answers to a task's data."""
        for number in range(len(job.learn)):
            inputs, target = job.learn.batch(number)
            layer = self.objective.layer
            view = job.view(network.theta, inputs, target, layer=layer, plain=True)
            try:
                answer = self.objective.recall(view)
            except MergeError as error:
                raise error.at(task=job.name) from None
            self._known[job.name, number] = answer
            self.nbytes += nbytes_of(answer)
            if self.nbytes > self.keep:
                raise PlanError(
                    "the experts' answers are more than is kept",
                    task=job.name,
                    found=f"{self.nbytes} bytes after batch {number}",
                    expected=f"at most {self.keep} (keep)",
                    do="learn from hard labels (objective: pseudo_labels), on less data, or raise"
                    " keep",
                )

    def of(self, job: Job) -> Callable[[int], Any] | None:
        """The answers to a task's batches by number; None where none were kept."""
        if (job.name, 0) not in self._known:
            return None
        return lambda number: self._known[job.name, number]
