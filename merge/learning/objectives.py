"""Objectives: from what the merged model answers on a batch of one task to a loss.

Each says what it needs: nothing, labels, or what the task's expert answered (`recall` keeps that
of an expert's answer, once for each batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Contrastive",
    "Criterion",
    "CrossEntropy",
    "Distill",
    "Entropy",
    "Features",
    "LanguageModel",
    "Negation",
    "Objective",
    "Own",
    "PseudoLabels",
    "View",
    "labels_of",
]

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
class Criterion:
    """The task's own criterion, of output and target."""

    needs: Needs = "labels"
    layer: None = None

    def recall(self, view: View) -> Any:
        return None

    def loss(self, view: View) -> Tensor:
        found: Tensor = view.task.criterion(view.out, view.target)
        return found


@dataclass(frozen=True, slots=True)
class Own:
    """A function of the user's: (out, (inputs, target), task, what the expert returned) -> loss."""

    function: Callable[[Any, tuple[Any, Any], Any, Any], Tensor]
    needs: Needs = "inputs"
    layer: None = None

    def recall(self, view: View) -> Any:
        return _plain(view.out)

    def loss(self, view: View) -> Tensor:
        return self.function(view.out, (view.inputs, view.target), view.task, view.expert)


def _plain(out: Any) -> Any:
    """A model's output as plain mappings and tuples of tensors."""
    import torch

    if isinstance(out, torch.Tensor):
        return out.detach()
    if isinstance(out, Mapping):
        return {k: _plain(v) for k, v in out.items()}
    if isinstance(out, tuple | list):
        return tuple(_plain(v) for v in out)
    return out


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
