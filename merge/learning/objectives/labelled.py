"""Objectives that need targets: labels of classes, pairs, the next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError
from merge.learning.objectives.view import Needs, View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Contrastive", "CrossEntropy", "LanguageModel", "Negation", "labels_of"]


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Cross-entropy against labels. smoothing: share of each label spread over all classes."""

    smoothing: float = 0.0
    needs: Needs = "labels"
    layer: None = None

    def recall(self, view: View) -> Any:
        return None

    def loss(self, view: View) -> Tensor:
        import torch.nn.functional as F  # noqa: N812

        logits = view.logits
        return F.cross_entropy(
            logits, labels_of(view, logits.shape[-1]), label_smoothing=self.smoothing
        )


@dataclass(frozen=True, slots=True)
class Negation:
    """Forget some tasks and keep the others: the other tasks' cross-entropy minus theirs.

    forget: names of tasks; those that have an expert, where none are named. floor: what the others
    keep of the base's validation score at least; candidates below it are not chosen.
    """

    forget: tuple[str, ...] = ()
    floor: float = 0.95
    needs: Needs = "labels"
    layer: None = None

    def recall(self, view: View) -> Any:
        return None

    def loss(self, view: View) -> Tensor:
        found = CrossEntropy().loss(view)
        return -found if self.forgets(view.name, view.has_expert) else found

    def forgets(self, name: str, has_expert: bool) -> bool:
        """Whether a task is one to forget."""
        return name in self.forget if self.forget else has_expert


@dataclass(frozen=True, slots=True)
class Contrastive:
    """InfoNCE: each input's embedding nearer to its own target's than to the others' of the batch.

    Targets are inputs too: a batch is (queries, positives). The loss is cross-entropy over cosines
    divided by the temperature.
    """

    temperature: float = 0.05
    needs: Needs = "labels"
    layer: None = None

    def recall(self, view: View) -> Any:
        return None

    def loss(self, view: View) -> Tensor:
        import torch
        import torch.nn.functional as F  # noqa: N812

        queries = view.to_logits(view.out)
        positives = view.to_logits(view.run(view.target))
        if len(queries) < 2:
            raise PlanError(
                "a batch has no other inputs to tell its own from",
                task=view.name,
                found=f"{len(queries)} rows",
                expected="at least 2",
            )
        cosines = F.normalize(queries, dim=-1) @ F.normalize(positives, dim=-1).T
        own = torch.arange(len(queries), device=cosines.device)
        return F.cross_entropy(cosines / self.temperature, own)


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The model's own loss where it returns one, else next-token cross-entropy of its logits.

    Tokens are the target, or ``input_ids`` of the inputs; -100 and masked places do not count.
    """

    needs: Needs = "inputs"
    layer: None = None

    def recall(self, view: View) -> Any:
        return None

    def loss(self, view: View) -> Tensor:
        import torch.nn.functional as F  # noqa: N812

        own = getattr(view.out, "loss", None)
        if own is not None:
            found: Tensor = own
            return found
        tokens, mask = view.target, None
        if isinstance(view.inputs, Mapping):
            tokens = view.inputs.get("input_ids") if tokens is None else tokens
            mask = view.inputs.get("attention_mask")
        logits = view.to_logits(view.out)
        if tokens is None or logits.dim() != 3:
            raise PlanError(
                "a task is no language model",
                task=view.name,
                found=f"scores of shape {list(logits.shape)}",
                expected="(rows, length, tokens), and input_ids or targets",
            )
        wanted = tokens[:, 1:]
        if mask is not None:
            wanted = wanted.masked_fill(mask[:, 1:] == 0, -100)
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), wanted.reshape(-1))


def labels_of(view: View, classes: int) -> Tensor:
    """The labels of a batch; PlanError, with the task's name, unless they are classes."""
    import torch

    target = view.target
    if not isinstance(target, torch.Tensor) or target.is_floating_point():
        raise PlanError(
            "a batch has no labels",
            task=view.name,
            found=type(target).__name__ if not isinstance(target, torch.Tensor) else target.dtype,
            expected="a tensor with the number of a class for each row",
        )
    labels = target.reshape(-1).long()
    counted = labels[labels != -100]
    if len(counted) and (int(counted.min()) < 0 or int(counted.max()) >= classes):
        raise PlanError(
            "a label is out of range",
            task=view.name,
            found=f"labels from {int(counted.min())} to {int(counted.max())}",
            expected=f"0 to {classes - 1}",
        )
    return labels
