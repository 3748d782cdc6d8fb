"""What an objective sees, a batch of one task at a time, and what it must answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Needs", "Objective", "View"]

Needs = Literal["inputs", "labels", "expert"]


@dataclass(slots=True, eq=False)
class View:
    """One batch of a task as an objective sees it.

    out: what the module returned. expert: what `Objective.recall` kept of the expert's answer. run:
    the merged model on other inputs. features: the output of the layer that the objective names.
    """

    task: Any
    name: str
    inputs: Any
    target: Any
    out: Any
    expert: Any
    run: Callable[[Any], Any]
    to_logits: Callable[[Any], Tensor]
    features: Any = None
    has_expert: bool = True

    @property
    def logits(self) -> Tensor:
        """Scores of classes, (rows, classes); PlanError where there are fewer than two."""
        found: Tensor = self.to_logits(self.out)
        if found.dim() < 2 or found.shape[-1] < 2:
            raise PlanError(
                "a task's output does not choose between classes",
                task=self.name,
                found=f"scores of shape {list(found.shape)}",
                expected="(rows, classes) with two classes or more",
                do="give the task's module a head, or say with logits= where its scores are",
            )
        return found.reshape(-1, found.shape[-1])


class Objective(Protocol):
    """What is minimised, a batch of one task at a time."""

    @property
    def needs(self) -> Needs:
        """What a batch must have."""

    @property
    def layer(self) -> str | None:
        """The module whose output it looks at, where it looks at one."""

    def recall(self, view: View) -> Any:
        """What is kept of an expert's answer: a tree of tensors with a row for each input."""

    def loss(self, view: View) -> Tensor:
        """The mean loss of the batch."""
