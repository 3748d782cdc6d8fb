"""Tensors of a network that are learned for one task alone: its head, or any layer by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from merge.errors import PlanError, RecipeError, nearest
from merge.learning.network import TEMPERATURE, Job
from merge.learning.objectives import (
    CrossEntropy,
    Distill,
    Entropy,
    Negation,
    Objective,
    PseudoLabels,
)
from merge.learning.places import matches

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ALL", "free_tensors", "layers_in", "set_apart", "with_temperatures"]

ALL = "*"
"""In the setting ``free``: all that a task's network has besides the merged tensors."""


def set_apart(
    task: str, places: Mapping[str, tuple[str, ...]], patterns: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Where merged tensors lie, without those that the task shall have for itself; and these.

    patterns: names of layers, of the network or of the merged model. The second mapping is from
    the merged tensor's name to that in the network. PlanError for a tensor that the network uses
    under two names.
    """
    wanted = [p for p in patterns if p != ALL]
    apart: dict[str, str] = {}
    for merged, inside in places.items():
        if not matches(merged, wanted) and not any(matches(n, wanted) for n in inside):
            continue
        if len(inside) > 1:
            raise PlanError(
                "a tensor that is used twice cannot be one task's own",
                task=task,
                tensor=merged,
                found=f"it is {' and '.join(inside)}",
                do="name another layer",
            )
        apart[merged] = inside[0]
    return {n: p for n, p in places.items() if n not in apart}, apart


def free_tensors(
    task: str,
    module: nn.Module,
    own: Mapping[str, Tensor],
    layers: Mapping[str, str],
    patterns: Sequence[str],
) -> dict[str, Tensor]:
    """Copies of the tensors that are learned for the task, which want gradients.

    own: what the task has for itself. layers: those of them that the merged model has too, as
    `set_apart` found them. PlanError where a pattern fits nothing.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    told = {inside: merged for merged, inside in layers.items()}
    found: dict[str, Tensor] = {}
    for pattern in patterns:
        hit = [
            n
            for n, t in own.items()
            if pattern == ALL or matches(n, [pattern]) or matches(told.get(n, n), [pattern])
            if n in parameters and t.is_floating_point()
        ]
        if not hit:
            raise _no_such(task, pattern, own, parameters)
        found |= {n: own[n].clone().requires_grad_(True) for n in hit if n not in found}
    return {n: found[n] for n in own if n in found}


def with_temperatures(jobs: Sequence[Job], objective: Objective) -> list[Job]:
    """The tasks with a temperature of their scores that is learned, and is 1 at first.

    RecipeError for an objective that looks at no scores of classes.
    """
    import torch

    if not isinstance(objective, CrossEntropy | PseudoLabels | Distill | Entropy | Negation):
        raise RecipeError(
            "the objective looks at no scores of classes, which could have a temperature",
            key="temperature",
            found=type(objective).__name__,
            expected="cross_entropy, pseudo_labels, distill or entropy",
        )
    return [
        replace(
            job,
            free={**job.free, TEMPERATURE: torch.zeros((), device=job.device, requires_grad=True)},
        )
        for job in jobs
    ]


def layers_in(names: Iterable[str]) -> list[str]:
    """The layers that names of tensors tell of, and the tensors: all that a pattern may name.

    >>> layers_in(["a.b.weight"])
    ['a', 'a.b', 'a.b.weight']
    """
    out: dict[str, None] = {}
    for name in names:
        words = name.split(".")
        out |= dict.fromkeys(".".join(words[: i + 1]) for i in range(len(words)))
    return list(out)


def _no_such(
    task: str, pattern: str, own: Mapping[str, Tensor], parameters: Iterable[str]
) -> PlanError:
    if pattern == ALL:
        return PlanError(
            "a task has no head to learn: its module has no tensors of its own",
            task=task,
            key="free",
            found="all tensors are merged" if not own else ", ".join(list(own)[:4]),
            do="take a model with a head, name the task's head= in its module, or name a layer:"
            " free: [LAYER]",
        )
    names = list(parameters)
    near = nearest(pattern, layers_in(names))
    return PlanError(
        "a task's network has no such layer to learn",
        task=task,
        key="free",
        found=pattern,
        expected=f"a layer or a tensor, such as {', '.join(_ends(names))}",
        do=f"did you mean {near!r}?" if near else None,
    )


def _ends(names: Sequence[str]) -> list[str]:
    """The modules of the last few tensors: heads and what leads to them."""
    modules = dict.fromkeys(n.rpartition(".")[0] or n for n in names)
    return list(modules)[-4:]
