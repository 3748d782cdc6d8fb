"""Steps of a recipe that weights and data decide: alignment before a merge, repair after it.

They are computed while the recipe is compiled, by whoever compiles it; a plan can do without, since
neither changes a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from merge.errors import MergeError
from merge.ir.align import short
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference, parse_reference
from merge.recipe.document import Place
from merge.recipe.inputs import Named
from merge.recipe.learned import Learner
from merge.recipe.read import Stage
from merge.recipe.schema import AlignEntry, RepairEntry
from merge.recipe.together import Inputs

__all__ = ["Steps", "align_models", "repair_result"]

Mover = Callable[[Checkpoint], Checkpoint]


class Steps(Learner, Protocol):
    """Computes what a recipe leaves to weights and data; each tells in words what it found."""

    def align(self, model: Checkpoint, to: Checkpoint, how: AlignEntry) -> tuple[Mover, str]:
        """What brings ``model``, and whatever has its tensors, into the coordinates of ``to``."""

    def repair(
        self, merged: Checkpoint, parents: Sequence[Checkpoint], how: RepairEntry
    ) -> tuple[Checkpoint, str]:
        """The merged checkpoint with its parents' statistics."""


def align_models(stage: Stage, inputs: Inputs, steps: Steps | None, notes: list[str]) -> Inputs:
    """The models as the stage wants them aligned; as they are where ``steps`` is None."""
    models = dict(inputs.models)
    for wanted in _wanted(stage, inputs):
        named, to = wanted.named, wanted.to
        pair = f"{short(str(named.reference))} to {short(str(to))}"
        line = stage.document.where(wanted.place)["line"]
        if steps is None:
            _check_shapes(stage, wanted, inputs)
            notes.append(
                f"line {line}: {pair} is aligned when the recipe is applied; here the model is"
                " taken as it is (merge plan --align computes it now)"
            )
            continue
        try:
            move, told = steps.align(inputs.models[named.reference], inputs.models[to], wanted.how)
            models[named.reference] = move(inputs.models[named.reference])
            if named.statistics is not None:
                known = named.statistics.reference
                models[known] = move(inputs.models[known])
        except MergeError as error:
            raise error.at(**stage.document.where(wanted.place)) from None
        notes.append(f"line {line}: {pair}: {told}")
    return replace(inputs, models=models)


def _check_shapes(stage: Stage, wanted: _Wanted, inputs: Inputs) -> None:
    """What is carried over into other widths or depths can be planned only once it is."""
    model, to = inputs.models[wanted.named.reference], inputs.models[wanted.to]
    odd = [n for n in model.tensors if n not in to.tensors]
    odd += [n for n, e in model.tensors.items() if n in to.tensors and e.shape != to[n].shape]
    if wanted.how.method == "transport" and odd:
        raise stage.document.error(
            "the models are of different sizes until one is carried over into the other",
            wanted.place,
            key="align",
            found=f"{wanted.named.reference} differs from {wanted.to} in {odd[0]}",
            do="give --align, so that this is computed now",
        )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A model that is to be aligned with another, and where the recipe says so."""

    named: Named
    to: Reference
    how: AlignEntry
    place: Place


def _wanted(stage: Stage, inputs: Inputs) -> list[_Wanted]:
    """What is to be aligned with what, each model once; all that cannot be is refused."""
    statistics = {id(n.statistics) for n in inputs.named}
    found: dict[Reference, _Wanted] = {}
    for named in inputs.named:
        how = named.align or stage.model.align
        own = named.align is not None
        place: Place = (*named.place[:-1], "align") if own else ("align",)
        if how is None or how.method == "none" or id(named) in statistics:
            continue
        if named.statistics is not None and named.statistics.reference in inputs.apart:
            raise stage.document.error(
                "statistics of inputs cannot follow their model into other coordinates",
                place,
                key="align",
                found=f"statistics: {named.statistics.reference}",
                do="align and save the model first, and gather its statistics then",
            )
        if named.part is not None:
            raise stage.document.error(
                "models are aligned whole, and this one is merged in part",
                place,
                key="align",
                found=f"a part called {named.part!r}",
                do="align the models in a stage of their own first",
            )
        to = _target(stage, inputs, how, place)
        if to != named.reference:
            found.setdefault(named.reference, _Wanted(named, to, how, place))
        elif own:
            raise stage.document.error("a model is aligned with itself", place, key="align")
    for wanted in found.values():
        if wanted.to in found:
            other = found[wanted.to].to
            raise stage.document.error(
                "a model is aligned with one that is itself aligned with another",
                wanted.place,
                key="align",
                found=f"{wanted.named.reference} to {wanted.to}, and {wanted.to} to {other}",
                do=f"align both with {other}",
            )
    return list(found.values())


def _target(stage: Stage, inputs: Inputs, how: AlignEntry, place: Place) -> Reference:
    """Whose coordinates are taken: as it is said, else the base's, else the first model's."""
    if how.to is None:
        return stage.model.base_model or inputs.named[0].reference
    if how.to == "base":
        if stage.model.base_model is None:
            raise stage.document.error(
                "models are to be aligned with the base, and there is none",
                (*place, "to"),
                key="to",
                expected="a base_model, or the name of a model",
            )
        return stage.model.base_model
    try:
        wanted = parse_reference(how.to)
    except ValueError as error:
        raise stage.document.error(str(error), (*place, "to"), key="to") from None
    if wanted not in inputs.models:
        names = list(dict.fromkeys(str(n.reference) for n in inputs.named))
        raise stage.document.error(
            "models are to be aligned with one that the stage does not name",
            (*place, "to"),
            key="to",
            found=repr(how.to),
            expected=f"base, or one of {', '.join(names)}",
        )
    return wanted


def repair_result(
    stage: Stage,
    merged: Checkpoint,
    parents: Sequence[Checkpoint],
    steps: Steps | None,
    notes: list[str],
) -> Checkpoint:
    """The stage's result, its statistics put right where the recipe wants it."""
    how = stage.model.repair
    if how is None:
        return merged
    line = stage.document.where(("repair",))["line"]
    if stage.model.models is None:
        raise stage.document.error(
            "a result is repaired by the statistics of whole models",
            ("repair",),
            key="repair",
            found="slices" if stage.model.slices is not None else "modules",
            expected="models",
        )
    if how.weights is not None and len(how.weights) != len(parents):
        raise stage.document.error(
            "there is not one weight for each model",
            ("repair", "weights"),
            key="weights",
            found=len(how.weights),
            expected=len(parents),
        )
    if steps is None:
        notes.append(
            f"line {line}: the result's statistics will be put right on {how.data} when the recipe"
            " is applied"
        )
        return merged
    try:
        found, told = steps.repair(merged, parents, how)
    except MergeError as error:
        raise error.at(**stage.document.where(("repair",))) from None
    notes.append(f"line {line}: {told}")
    return found
