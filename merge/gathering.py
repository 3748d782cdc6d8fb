"""Statistics of checkpoints on data, as checkpoints that are computed when they are saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError
from merge.ir.align import short, some
from merge.ir.checkpoint import Checkpoint
from merge.plan import parse_bytes
from merge.tasks import names_in_files, open_data, state_of

if TYPE_CHECKING:
    from torch import Tensor

    from merge.analysis.task import Task
    from merge.statistics.layers import Layer

__all__ = ["KINDS", "gather_statistics"]

KINDS = ("gram",)
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
) -> Checkpoint:
    """What data says of a model's weights, not yet computed: `save` it, or merge with it.

    kind: ``gram``, for `regmean`: C = X^T X / n for the inputs X of each linear layer and
    convolution, one row for each token or patch, without padded tokens. data: a `Task`, or what
    names one; its training batches are run. samples: how many examples. memory: bytes of sums that
    are held at a time; what needs more goes over the data again. The model is in memory, once.
    PlanError where there is no data, or no layer whose inputs can be seen.
    """
    if kind not in KINDS:
        raise RecipeError(
            "no such kind of statistics", found=repr(kind), expected=f"one of {', '.join(KINDS)}"
        )
    checkpoint = open_checkpoint(model)
    task = open_data(data, checkpoint)
    found = _grams(checkpoint, task, samples, parse_bytes(memory))
    said = {
        "kind": kind,
        "model": short(checkpoint.label),
        "data": data if isinstance(data, str) else type(task.module).__name__,
        "examples": samples,
    }
    side = found.side.with_texts({FILE: json.dumps(said, indent=2) + "\n"})
    return replace(found, side=side, roots=checkpoint.roots)


def _grams(checkpoint: Checkpoint, task: Task, samples: int, memory: int) -> Checkpoint:
    from merge.statistics.examples import first_examples
    from merge.statistics.grams import gathered_grams, portions
    from merge.statistics.lazy import computed_checkpoint

    batches = first_examples(task.inputs(), samples)
    layers, names, notes = _layers(checkpoint, task)
    state = on_device(task, state_of(task, checkpoint))
    parts = portions(layers, memory // 2)
    uses = [dict.fromkeys(layer.weight for layer in part) for part in parts]

    def compute(wanted: Sequence[str]) -> Mapping[str, Tensor]:
        chosen = [layer for layer in layers if names[layer.weight] in set(wanted)]
        found = gathered_grams(task.module, chosen, lambda x: task.output(state, x), batches)
        return {names[n]: gram for n, gram in found.items()}

    made = computed_checkpoint(
        f"Gram matrices of {checkpoint.label}",
        {names[layer.weight]: layer.gram for layer in layers},
        [[names[n] for n in part] for part in uses],
        compute,
    )
    return replace(made, notes=tuple(notes))


def on_device(task: Task, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors where the task's module has its own."""
    own = next(iter(task.module.parameters()), None)
    return {n: t if own is None else t.to(own.device) for n, t in state.items()}


def _layers(checkpoint: Checkpoint, task: Task) -> tuple[list[Layer], Mapping[str, str], list[str]]:
    """The layers whose weights the checkpoint has, in the order of its names; names in files."""
    from merge.statistics.layers import linear_layers

    known = names_in_files(task, checkpoint)
    every = linear_layers(task.module)
    names = {layer.weight: known.get(layer.weight, layer.weight) for layer in every}
    shapes = {n: tuple(t.shape) for n, t in task.module.state_dict().items()}

    def stored(layer: Layer) -> bool:
        expr = checkpoint.tensors.get(names[layer.weight])
        return expr is not None and expr.shape == shapes[layer.weight]

    layers = sorted(filter(stored, every), key=lambda layer: names[layer.weight])
    if not layers:
        raise PlanError(
            "the network has no linear layer or convolution that is a tensor of the checkpoint",
            model=checkpoint.label,
            found=type(task.module).__name__,
            expected="weights of torch.nn layers under the checkpoint's names",
        )
    lost = list(dict.fromkeys(layer.weight for layer in every if not stored(layer)))
    notes = [f"{len(lost)} layers are no tensors of the checkpoint: {some(lost)}"] if lost else []
    return layers, names, notes
