"""The models of a stage, opened together: in one tree, and their heads as the recipe wants them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from merge import methods
from merge.errors import MergeError
from merge.families.heads import without_heads
from merge.families.layers import Layers
from merge.families.modules import modules_of
from merge.families.reconcile import Part, followed, reconcile
from merge.families.roles import parts_of
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.recipe.document import Document
from merge.recipe.inputs import Named, OpenAt, named_models
from merge.recipe.schema import RecipeModel

__all__ = ["Inputs", "open_together", "part_names", "settle_heads"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """A stage's models, the donor first: its tree, config and other side files are the result's.

    heads: those of the result, where the recipe takes them as they are. apart: which of ``models``
    are statistics of inputs, which have shapes of their own.
    """

    named: tuple[Named, ...]
    models: Mapping[Reference, Checkpoint]
    heads: Checkpoint | None = None
    apart: frozenset[Reference] = frozenset()

    def through(self, open_at: OpenAt) -> Inputs:
        """The same models as ``open_at`` opens them."""
        first = {n.reference: n for n in reversed(self.named)}
        opened = {r: open_at(r, first[r].place) for r in self.models}
        return replace(self, models=opened)

    @property
    def donor(self) -> Checkpoint:
        """The first model."""
        return self.models[self.named[0].reference]


def open_together(model: RecipeModel, document: Document, open_at: OpenAt) -> Inputs:
    """Every model of a stage in the tree of the first: the base, else the first that is listed.

    With a ``scope`` it is the first of those that are made of the most parts: the rest is theirs.
    """
    named = named_models(model)
    if model.base_model is not None:
        named = [named[-1], *named[:-1]]
    known = [(n, n.statistics) for n in named if n.statistics is not None]
    apart = methods.get(model.merge_method).statistic is not None
    named += [] if apart else [statistic for _, statistic in known]
    opened = {n.reference: open_at(n.reference, n.place) for n in named}
    if model.scope is not None:
        parts_in = [len(set(parts_of(opened[n.reference].tensors).values())) for n in named]
        named = [named[parts_in.index(max(parts_in))], *named]
    references = list(dict.fromkeys(n.reference for n in named))
    parts = [_part(r, named) for r in references]
    if model.scope is None:
        parts[0] = None  # the donor's config is for all that it holds
    try:
        settled = reconcile([opened[r] for r in references], parts)
    except MergeError as error:
        label = error.where.get("model")
        place = next((n.place for n in named if opened[n.reference].label == label), ())
        raise error.at(**document.where(place or ("merge_method",))) from None
    models = dict(zip(references, settled, strict=True))
    if not apart:
        return Inputs(tuple(named), models)
    beside = {
        s.reference: followed(
            open_at(s.reference, s.place), opened[n.reference], models[n.reference]
        )
        for n, s in known
    }
    return Inputs(tuple(named), {**models, **beside}, apart=frozenset(beside))


def _part(reference: Reference, named: Sequence[Named]) -> Part | None:
    """What a model is a model of; None where it is not named for a part."""
    wanted = dict.fromkeys(n.part for n in named if n.reference == reference)
    parts = [part for part in wanted if part is not None]
    if len(parts) < len(wanted):
        return None

    def part(names: Iterable[str]) -> frozenset[str]:
        return frozenset(n for found in modules_of(names, parts).values() for n in found)

    return part


def settle_heads(inputs: Inputs, rule: str) -> Inputs:
    """The models without heads, unless they are merged, and those that the result has instead."""
    if rule == "merge":
        return inputs
    references = [r for r in inputs.models if r not in inputs.apart]
    words = [str(r) for r in references]
    kind = rule if rule in ("drop", "keep") else "take"
    kept = _folders(inputs) if rule == "keep" else {}
    whole = [inputs.models[r] for r in references]
    found = without_heads(whole, kind, words.index(rule) if rule in words else 0, kept)
    models = {**inputs.models, **dict(zip(references, found.models, strict=True))}
    gone = {n for old, new in zip(whole, found.models, strict=True) for n in old if n not in new}
    for reference in inputs.apart:
        rest = {n: e for n, e in models[reference].tensors.items() if n not in gone}
        models[reference] = replace(models[reference], tensors=rest)
    return replace(inputs, models=models, heads=found.heads)


def _folders(inputs: Inputs) -> dict[str, int]:
    """A plain name of a folder for each model but the first, and its number."""
    statistics = {n.statistics.reference for n in inputs.named if n.statistics is not None}
    out: dict[str, int] = {}
    for i, reference in enumerate(inputs.models):
        if i > 0 and reference not in statistics:
            last = str(reference).replace("\\", "/").rstrip("/").rpartition("/")[2]
            plain = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip(".-") or "model"
            while plain in out:
                plain = f"{plain}-{i}"
            out[plain] = i
    return out


def part_names(checkpoint: Checkpoint) -> list[str]:
    """Names by which parts of a model may be called in a recipe."""
    senses = [m for m, n in modules_of(checkpoint.tensors, _SENSES).items() if n]
    heads = dict.fromkeys(n.partition(".")[0] for n in checkpoint.tensors)
    return [*(senses if len(senses) > 1 else []), *Layers.of(checkpoint.tensors).stacks, *heads]


_SENSES = ("text", "vision", "audio", "projector")
