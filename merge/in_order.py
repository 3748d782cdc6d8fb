"""RegMean++: layers merged one after another, of checkpoints with their data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from merge import methods
from merge.checkpoint import open_checkpoint
from merge.errors import RecipeError
from merge.families.layers import place_of
from merge.families.reconcile import reconcile
from merge.gathering import inputs_of, layers_of, output_of
from merge.given import by_names, several
from merge.ir.align import short
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import cast
from merge.ir.merging import merge_checkpoints
from merge.placing import placed
from merge.statistics.examples import first_examples
from merge.tasks import open_data

if TYPE_CHECKING:
    from torch import Tensor

    from merge.analysis.task import Task

__all__ = ["regmean_plus_plus"]


def regmean_plus_plus(
    models: Mapping[str, object] | Sequence[object],
    data: Mapping[str, str | Task] | Sequence[str | Task],
    *,
    unit: str = "block",
    samples: int = 256,
    weight: float | Mapping[str, float] | Sequence[float] = 1.0,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    normalize: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """RegMean++ (Nguyen et al. 2025, arXiv:2508.03121): `regmean`, layer after layer.

    The inputs of a layer come through the layers below as they were already merged, so that each
    corrects what the merging of those has done. models, data: one set for each model, in lists or
    in mappings with the same names. unit: what is merged at once: ``block``, on inputs that each
    model's own layers of the block pass on, or ``layer``, which runs the network once for each.
    samples: examples of each model. weight, alpha, ridge, normalize: as of `regmean`. progress:
    called with the name of each weight that is done. In memory are the merged network, one block of
    every model, and its Gram matrices.
    """
    from merge.statistics.sequential import Member, merge_in_order

    units = {"block": _block, "layer": _layer}
    if unit not in units:
        raise RecipeError("no such unit", key="unit", found=repr(unit), expected=", ".join(units))
    listed, names = several(models)
    sets, _ = several(by_names(data, names, "sets of data"), "data")
    if len(listed) != len(sets):
        raise RecipeError(
            "there is not one set of data for each model", found=len(sets), expected=len(listed)
        )
    method = methods.get("regmean")
    given = {
        "weight": by_names(weight, names, "weights"),
        "alpha": alpha,
        "ridge": ridge,
        "normalize": normalize,
    }
    bound = method.bind(len(listed), given)
    opened = reconcile([open_checkpoint(m) for m in listed])
    mean = merge_checkpoints(methods.get("linear"), opened, None, lambda _: _linear(bound))
    tasks = [open_data(d, c) for d, c in zip(sets, opened, strict=True)]
    whole = placed(tasks[0], mean)
    merged, files = whole.state(), whole.files
    layers, notes = layers_of(whole)
    members = [
        Member(
            task.module,
            first_examples(inputs_of(task), samples),
            placed(task, c).some,
            partial(output_of, task),
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
            progress(files[name])
    found = open_checkpoint({files[n]: merged[n] for n in done})
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
