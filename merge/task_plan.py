"""What a recipe will learn for single tasks, told from the headers of its models."""

from __future__ import annotations

from collections.abc import Mapping

from merge.analysis.named import is_function
from merge.errors import MergeError, PlanError, nearest
from merge.families.heads import task_heads
from merge.ir.checkpoint import Checkpoint
from merge.learning.free import ALL, layers_in
from merge.learning.places import matches
from merge.learning.settings import Settings, settings_of
from merge.recipe.explain import Made
from merge.recipe.learned import TASKS, names_of
from merge.recipe.tune_words import DataEntry

__all__ = ["tasks_told"]

_SHOWN = 4


def tasks_told(made: Made, models: Mapping[str, Checkpoint]) -> list[str]:
    """For each task of a stage that learns, what it is to have for itself; in words.

    models: as they were opened, by their names in the recipe. PlanError for a task that has no
    head to learn.
    """
    how = made.stage.model.learn
    if how is None or how.data is None:
        return []
    where = made.stage.document.where(("learn",))
    settings = settings_of(how.preset, how.how)
    if not settings.free and settings.surgery is None:
        return []
    called = [o.called for o in made.operands[0]]
    known = {n: models.get(c) for n, c in zip(names_of(made), called, strict=True)}
    try:
        told = [_told(name, entry, known.get(name), settings) for name, entry in how.data.items()]
    except MergeError as error:
        key = "free" if how.free is not None else "preset"
        raise error.at(**made.stage.document.where(("learn", key))) from None
    return [f"line {where['line']}: {line}" for line in told]


def _told(task: str, entry: DataEntry, model: Checkpoint | None, settings: Settings) -> str:
    who = f"task {task}" if task else "the task"
    parts = []
    if settings.free:
        parts.append(f"learns {_free(task, entry, model, settings)} for itself")
    if settings.surgery is not None:
        layer = settings.surgery or "the whole network"
        if layer == settings.surgery and model is not None and not _own_code(entry):
            layer += _doubt(layer, model)
        parts.append(f"gets a correction of rank {settings.surgery_rank} behind {layer}")
    return f"{who} {' and '.join(parts)}, which will be in {TASKS}/"


def _free(task: str, entry: DataEntry, model: Checkpoint | None, settings: Settings) -> str:
    """The tensors that match ``free``, as far as headers tell."""
    if model is None or _own_code(entry):
        named = [f for f in settings.free if f != ALL]
        every = ["all tensors that its network has besides the merged ones"]
        return " and ".join([*(every if ALL in settings.free else []), *named])
    names: dict[str, None] = {}
    for pattern in settings.free:
        heads = () if entry.head is not None else task_heads(model)
        hit = [
            n for n in model.tensors if (n in heads if pattern == ALL else matches(n, [pattern]))
        ]
        if not hit and pattern == ALL:
            raise PlanError(
                "a task has no head to learn",
                task=task,
                model=model.label,
                do="take a model with a head, or name a layer: free: [LAYER]",
            )
        if not hit:  # the network may have other names than its files
            hit = [f"{pattern}{_doubt(pattern, model)}"]
        names |= dict.fromkeys(hit)
    shown = [f"{n} {list(model[n].shape)}" if n in model else n for n in list(names)[:_SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more tensors" if more else "")


def _own_code(entry: DataEntry) -> bool:
    """Whether the task's network is made by a function, of which headers tell nothing."""
    return entry.model is not None or is_function(entry.path.partition("?")[0])


def _doubt(layer: str, model: Checkpoint) -> str:
    """A word where no tensor of the files lies in a layer; one without tensors may be there."""
    if any(matches(n, [layer]) for n in model.tensors):
        return ""
    near = nearest(layer, layers_in(model.tensors))
    return f" (its files have no tensor there{f': did you mean {near!r}?' if near else ''})"
