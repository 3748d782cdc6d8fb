"""Statistics of checkpoints on data, as checkpoints that are computed when they are saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from merge.checkpoint import open_checkpoint
from merge.errors import MergeError, PlanError, RecipeError, told
from merge.ir.align import short, some
from merge.ir.checkpoint import Checkpoint
from merge.learning.batches import pair
from merge.placing import Placed, placed
from merge.plan import parse_bytes
from merge.statistics.examples import first_examples
from merge.tasks import open_data

if TYPE_CHECKING:
    from torch import Tensor

    from merge.analysis.task import Task
    from merge.statistics.layers import Layer

__all__ = ["KINDS", "LABELS", "gather_statistics", "inputs_of", "layers_of", "output_of"]

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
    if samples < 1:
        raise RecipeError("too few examples", key="samples", found=samples, expected="1 or more")
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


def inputs_of(task: Task) -> Iterator[Any]:
    """Inputs of the training batches, or else of those that are there to be adapted to."""
    name = task.name or type(task.module).__name__
    return (pair(name, item)[0] for item in task.train or task.adapt)


def _grams(checkpoint: Checkpoint, task: Task, samples: int, memory: int) -> Checkpoint:
    from merge.statistics.grams import gathered_grams
    from merge.statistics.lazy import computed_checkpoint, cut

    batches = first_examples(inputs_of(task), samples)
    found = placed(task, checkpoint)
    names, state = found.files, found.state()
    layers, notes = layers_of(found)
    shapes = {names[layer.weight]: layer.gram for layer in layers}

    def compute(wanted: Sequence[str]) -> Mapping[str, Tensor]:
        chosen = [layer for layer in layers if names[layer.weight] in set(wanted)]
        grams = gathered_grams(task.module, chosen, partial(output_of, task, state), batches)
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
            partial(output_of, task, whole),
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


def output_of(task: Task, state: Mapping[str, Tensor], inputs: Any) -> object:
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


def layers_of(found: Placed) -> tuple[list[Layer], list[str]]:
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
