"""Inputs without labels, for models that do not foretell words: to learn and measure on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from merge.analysis.task import Task
from merge.errors import SourceError
from merge.streams.batches import Batches, Collate
from merge.streams.examples import Example, divide, shuffled
from merge.streams.features import put_features
from merge.streams.models import Runner, logits_of
from merge.streams.spec import DataSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["classifies", "foretells", "unlabelled"]


def classifies(module: nn.Module) -> bool:
    """Whether it is a classifier of transformers."""
    return "Classification" in type(module).__name__


def foretells(module: nn.Module) -> bool:
    """Whether it is a language model: it takes the tokens to be found, and is no classifier."""
    return "labels" in inspect.signature(module.forward).parameters and not classifies(module)


def unlabelled(
    spec: DataSpec, runner: Runner, examples: Sequence[Example], collate: Collate
) -> Task:
    """A task of inputs alone. An encoder without a head returns features (`put_features`).

    It can be learned and measured on, by what the models themselves answer; judged by it cannot be.
    """
    if spec.model is None and not classifies(runner.module):
        put_features(runner)
    parts = divide(examples, spec)
    learnt = {p: shuffled(parts[p], spec.seed) for p in ("adapt", "train")}
    made = {p: Batches(es, spec.batch, collate, spec.name) for p, es in {**parts, **learnt}.items()}
    return Task(
        runner.module,
        _judged(spec),
        made["train"],
        made["test"],
        load=runner.load,
        name=spec.called,
        adapt=made["adapt"],
        validate=made["validate"],
        logits=logits_of,
    )


def _judged(spec: DataSpec) -> Callable[[Any, Any], Tensor]:
    pairs = spec.positive is not None

    def loss(out: Any, target: Any) -> Tensor:
        raise SourceError(
            "pairs are learned from by contrast, and nothing is judged by them"
            if pairs
            else "data without labels cannot judge a model",
            file=spec.path,
            expected="a label for each example",
            do=None if pairs else "name the field with the label: label=...",
        )

    return loss
