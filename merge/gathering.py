"""Statistics of checkpoints on data, as checkpoints that are computed when they are saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from merge import methods
from merge.analysis.named import told
from merge.checkpoint import open_checkpoint
from merge.errors import MergeError, PlanError, RecipeError
from merge.families.layers import place_of
from merge.families.reconcile import reconcile
from merge.ir.align import short, some
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import cast
from merge.ir.merging import merge_checkpoints
from merge.learning.batches import pair
from merge.placing import Placed, placed
from merge.plan import parse_bytes
from merge.statistics.examples import first_examples
from merge.tasks import open_data

if TYPE_CHECKING:
    from torch import Tensor

    from merge.analysis.task import Task
    from merge.statistics.layers import Layer

__all__ = ["KINDS", "LABELS", "gather_statistics", "regmean_plus_plus"]

KINDS = ("gram", "fisher")
LABELS = ("model", "data")
MEMORY = 1 << 30
FILE = "merge_statistics.json"
"""Says what the statistics in a folder are of."""


def gather_statistics(
    model: object,
    data: str | Task,
    *,
    kind: str = "gram",
    samples: int = 256,
    memory: int | str = MEMORY,
    labels: str = "model",
    seed: int = 0,
) -> Checkpoint:
    """What data says of a model's weights, not yet computed: `save` it, or merge with it.

    kind: ``gram``, for `regmean`: C = X^T X / n for the inputs X of each linear layer and
    convolution, one row for each token or patch, without padded tokens. ``fisher``, for `fisher`:
    the mean over examples of the squared gradient of the log-likelihood, one example at a time.
    data: a `Task`, or what names one; its training batches are run. samples: how many examples.
    memory: bytes of sums that are held at a time; what needs more goes over the data again. labels,
    seed: of ``fisher``: ``model`` expects over the model's own labels (over all of up to 64
    classes; of more, such as tokens, one is drawn for each place), ``data`` takes the task's loss
    on its targets. The model is in memory, once. PlanError where there is no data, or no layer
    whose inputs can be seen.
    """
    for key, word, known in (("kind", kind, KINDS), ("labels", labels, LABELS)):
        if word not in known:
            raise RecipeError(
                f"the value of {key!r} is no known word",
                key=key,
                found=repr(word),
                expected=f"one of {', '.join(known)}",
            )
    checkpoint = open_checkpoint(model)
    task = open_data(data, checkpoint)
    held = parse_bytes(memory)
    found = (
        _grams(checkpoint, task, samples, held)
        if kind == "gram"
        else _fisher(checkpoint, task, samples, held, labels, seed)
    )
    said = {
        "kind": kind,
        "model": short(checkpoint.label),
        "data": data if isinstance(data, str) else type(task.module).__name__,
        "examples": samples,
    }
    side = found.side.with_texts({FILE: json.dumps(said, indent=2) + "\n"})
    return replace(found, side=side, roots=checkpoint.roots)


def regmean_plus_plus(
    models: Sequence[object],
    data: Sequence[str | Task],
    *,
    unit: str = "block",
    samples: int = 256,
    weight: float | Sequence[float] = 1.0,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    normalize: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """RegMean++ (Nguyen et al. 2025, arXiv:2508.03121): `regmean`, layer after layer.

    The inputs of a layer come through the layers below as they were already merged, so that each
    corrects what the merging of those has done. data: one for each model. unit: what is merged at
    once: ``block``, on inputs that each model's own layers of the block pass on, or ``layer``,
    which runs the network once for each. samples: examples of each model. weight, alpha, ridge,
    normalize: as of `regmean`. progress: called with the name of each weight that is done. In
    memory are the merged network, one block of every model, and its Gram matrices.
    """
    from merge.statistics.sequential import Member, merge_in_order

    units = {"block": _block, "layer": _layer}
    if unit not in units:
        raise RecipeError("no such unit", key="unit", found=repr(unit), expected=", ".join(units))
    if len(models) != len(data):
        raise RecipeError(
            "there is not one set of data for each model", found=len(data), expected=len(models)
        )
    method = methods.get("regmean")
    given = {"weight": weight, "alpha": alpha, "ridge": ridge, "normalize": normalize}
    bound = method.bind(len(models), given)
    opened = reconcile([open_checkpoint(m) for m in models])
    mean = merge_checkpoints(methods.get("linear"), opened, None, lambda _: _linear(bound))
    tasks = [open_data(d, c) for d, c in zip(data, opened, strict=True)]
    whole = placed(tasks[0], mean)
    merged, names = whole.state(), whole.files
    layers, notes = _layers(whole)
    members = [
        Member(
            task.module,
            first_examples(_inputs(task), samples),
            placed(task, c).some,
            partial(_output, task),
        )
        for task, c in zip(tasks, opened, strict=True)
    ]

    def solve(maps: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
        placed = [g.to(maps[0].device) for g in grams]
        found: Tensor = method.function(maps, placed, **bound)
        return found

    done = []
    for name in merge_in_order(members, merged, layers, units[unit], solve):
        done.append(name)
        if progress is not None:
            progress(names[name])
    found = open_checkpoint({names[n]: merged[n] for n in done})
    solved = {n: cast(e, mean.tensors[n].dtype) for n, e in found.tensors.items()}
    short_names = ", ".join(short(c.label) for c in opened)
    return replace(
        mean,
        tensors={**mean.tensors, **solved},
        label=f"regmean++({short_names})",
        notes=(*mean.notes, *notes),
    )


def _linear(bound: Mapping[str, Any]) -> dict[str, Any]:
    return {"weight": bound["weight"], "normalize": True}


def _block(name: str) -> str:
    """The layer of a stack that a tensor is in; what is in none goes by its module."""
    place = place_of(name)
    return _layer(name) if place is None else f"{place[0]} {place[1]}"


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _inputs(task: Task) -> list[Any]:
    """Inputs of the training batches, or else of those that are there to be adapted to."""
    name = task.name or type(task.module).__name__
    return [pair(name, item)[0] for item in task.train or task.adapt]


def _grams(checkpoint: Checkpoint, task: Task, samples: int, memory: int) -> Checkpoint:
    from merge.statistics.grams import gathered_grams
    from merge.statistics.lazy import computed_checkpoint, cut

    batches = first_examples(_inputs(task), samples)
    found = placed(task, checkpoint)
    names, state = found.files, found.state()
    layers, notes = _layers(found)
    shapes = {names[layer.weight]: layer.gram for layer in layers}

    def compute(wanted: Sequence[str]) -> Mapping[str, Tensor]:
        chosen = [layer for layer in layers if names[layer.weight] in set(wanted)]
        grams = gathered_grams(task.module, chosen, partial(_output, task, state), batches)
        return {names[n]: gram for n, gram in grams.items()}

    made = computed_checkpoint(
        f"Gram matrices of {checkpoint.label}",
        shapes,
        cut(list(shapes), lambda n: 8 * math.prod(shapes[n]), memory // 2),
        compute,
    )
    return replace(made, notes=tuple(notes))


def _fisher(
    checkpoint: Checkpoint, task: Task, samples: int, memory: int, labels: str, seed: int
) -> Checkpoint:
    import torch

    from merge.statistics.fisher import gathered_fisher, leaves_of
    from merge.statistics.layers import tied_names
    from merge.statistics.lazy import computed_checkpoint, cut

    batches = first_examples(task.train, samples)
    found = placed(task, checkpoint)
    state, tied = found.state(), tied_names(task.module)
    own = {found.files[n]: n for n in tied if n in found.files}
    shapes = {n: e.shape for n, e in checkpoint.tensors.items() if n not in checkpoint.tied}

    def compute(wanted: Sequence[str]) -> Mapping[str, Tensor]:
        moved = [n for n in wanted if n in own]
        leaves, whole = leaves_of([own[n] for n in moved], tied, state)
        made = gathered_fisher(
            list(leaves.values()),
            partial(_output, task, whole),
            batches,
            task.criterion if labels == "data" else None,
            seed,
            task.logits,
        )
        zeros = {n: torch.zeros(shapes[n]) for n in wanted if n not in own}
        return {**zeros, **{n: t.cpu() for n, t in zip(moved, made, strict=True)}}

    parts = cut(sorted(shapes), lambda n: 4 * math.prod(shapes[n]), memory // 2)
    made = computed_checkpoint(f"Fisher information of {checkpoint.label}", shapes, parts, compute)
    lost = [n for n in shapes if n not in own]
    notes = [f"{len(lost)} tensors are no weights of the network: {some(lost)}"] if lost else []
    notes += found.notes
    tensors = {n: made.tensors[checkpoint.tied.get(n, n)] for n in checkpoint.tensors}
    return replace(made, tensors=tensors, tied=checkpoint.tied, notes=tuple(notes))


def _output(task: Task, state: Mapping[str, Tensor], inputs: Any) -> object:
    """What the task's network returns; PlanError for what it raises."""
    try:
        return task.output(state, inputs)
    except MergeError:
        raise
    except Exception as error:  # the network's own code may raise anything
        raise PlanError(
            "the network cannot be run on the data",
            found=told(error),
            do="check that shapes and types are those that the network takes",
        ) from error


def _layers(found: Placed) -> tuple[list[Layer], list[str]]:
    """The layers whose weights the checkpoint has, in the order of its names; and notes."""
    from merge.statistics.layers import linear_layers

    every = linear_layers(found.task.module)
    layers = [layer for layer in every if layer.weight in found.files]
    layers.sort(key=lambda layer: found.files[layer.weight])
    if not layers:
        raise PlanError(
            "the network has no linear layer or convolution that is a tensor of the checkpoint",
            model=found.checkpoint.label,
            found=type(found.task.module).__name__,
            expected="weights of torch.nn layers under the checkpoint's names",
        )
    return layers, list(found.notes)
