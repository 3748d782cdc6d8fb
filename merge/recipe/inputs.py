"""The models that a stage names, in the order in which a reader meets them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from merge.ir.reference import Reference
from merge.recipe.document import Place
from merge.recipe.schema import ModelEntry, ModuleEntry, RecipeModel, SliceEntry, SourceEntry

__all__ = ["Named", "named_models"]


@dataclass(frozen=True, slots=True)
class Named:
    """A model's name and where it stands. statistics: where that model's statistic is named."""

    reference: Reference
    place: Place
    statistics: Place | None = None


def named_models(model: RecipeModel) -> list[Named]:
    """Every model that takes part in the merge; the base_model last."""
    found = [*_of(model, ())]
    for name, module in (model.modules or {}).items():
        found += _of(module, ("modules", name))
    if model.base_model is not None:
        found.append(Named(model.base_model, ("base_model",)))
    return found


def _of(part: RecipeModel | ModuleEntry, place: Place) -> Iterator[Named]:
    for i, entry in enumerate(part.models or ()):
        yield _entry(entry, (*place, "models", i))
    for i, piece in enumerate(part.slices or ()):
        yield from _slice(piece, (*place, "slices", i))


def _slice(piece: SliceEntry, place: Place) -> Iterator[Named]:
    for i, source in enumerate(piece.sources):
        yield _entry(source, (*place, "sources", i))
    if piece.base_model is not None:
        yield Named(piece.base_model, (*place, "base_model"))


def _entry(entry: ModelEntry | SourceEntry, place: Place) -> Named:
    known = None if entry.statistics is None else (*place, "statistics")
    return Named(entry.model, (*place, "model"), known)
