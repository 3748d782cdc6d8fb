"""The models that a stage names, in the order in which a reader meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.recipe.document import Place
from merge.recipe.schema import (
    AlignEntry,
    ModelEntry,
    ModuleEntry,
    RecipeModel,
    SliceEntry,
    SourceEntry,
)

__all__ = ["Named", "OpenAt", "named_models"]

OpenAt = Callable[[Reference, Place], Checkpoint]


@dataclass(frozen=True, slots=True)
class Named:
    """A model's name and where it stands.

    part: the module, or the scope, that it is named for. statistics: that model's statistic.
    align: how it is aligned, where its entry says so.
    """

    reference: Reference
    place: Place
    part: str | None = None
    statistics: Named | None = None
    align: AlignEntry | None = None


def named_models(model: RecipeModel) -> list[Named]:
    """Every model that takes part in the merge; the base_model last."""
    found = [*_of(model, (), model.scope)]
    for name, module in (model.modules or {}).items():
        found += _of(module, ("modules", name), name)
    if model.base_model is not None:
        found.append(Named(model.base_model, ("base_model",), model.scope))
    return found


def _of(part: RecipeModel | ModuleEntry, place: Place, name: str | None) -> Iterator[Named]:
    for i, entry in enumerate(part.models or ()):
        yield _entry(entry, (*place, "models", i), name)
    for i, piece in enumerate(part.slices or ()):
        yield from _slice(piece, (*place, "slices", i), name)


def _slice(piece: SliceEntry, place: Place, name: str | None) -> Iterator[Named]:
    for i, source in enumerate(piece.sources):
        yield _entry(source, (*place, "sources", i), name)
    if piece.base_model is not None:
        yield Named(piece.base_model, (*place, "base_model"), name)


def _entry(entry: ModelEntry | SourceEntry, place: Place, name: str | None) -> Named:
    known = None
    if entry.statistics is not None:
        known = Named(entry.statistics, (*place, "statistics"), name)
    return Named(entry.model, (*place, "model"), name, known, entry.align)
