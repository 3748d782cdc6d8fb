"""Sections of the output, each with its inputs and the levels of their parameters.

A merge of whole models is one section. Slices make one for each slice of layers, one for what comes
before the layers and one for what comes after; modules make those of each module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from merge.families.config import Origin, relayer
from merge.families.modules import modules_of
from merge.ir.align import short
from merge.ir.assembly import select
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.recipe.document import Place
from merge.recipe.inputs import OpenAt
from merge.recipe.levels import Level, Reader
from merge.recipe.schema import ModelEntry, RecipeModel, SourceEntry

__all__ = ["Assembly", "Input", "Opening", "Section"]

NamesOf = Callable[[Checkpoint], Mapping[str, str] | None]
"""What is taken of a model: from the output's names to its own; None for all as it is."""


@dataclass(frozen=True, slots=True)
class Input:
    """One model in a section: ``view`` holds what is used of it, under the output's names.

    names: from the output's names to the model's own, where they differ. span: the layers taken, in
    a slice.
    """

    called: str
    model: Checkpoint
    view: Checkpoint
    own: Level | None = None
    names: Mapping[str, str] | None = None
    statistics: Checkpoint | None = None
    span: tuple[int, int] | None = None

    def own_name(self, name: str) -> str:
        """How the model itself calls the output's tensor ``name``."""
        return name if self.names is None else self.names.get(name, name)

    def stands_for(self, base: Input) -> bool:
        """Whether this is the base: the same model, and the same layers of it."""
        return self is base or (self.span == base.span and self.model.same_as(base.model))


@dataclass(frozen=True, slots=True)
class Section:
    """Some tensors of the output. ``shared``: the levels below the models' own, highest first.

    donor: whose names are the result's, where that is neither the base nor the first input.
    """

    inputs: tuple[Input, ...]
    base: Input | None
    shared: tuple[Level, ...]
    depth: Callable[[str], float]
    place: Place  # of what defines it in the recipe
    whole: bool = True  # not of a slice
    donor: Checkpoint | None = None


@dataclass(slots=True)
class Assembly:
    """The sections, the model whose side files are taken, and how its config changes.

    rest: tensors that are taken from a model as they are: those of the donor that belong to no
    module of the recipe, and heads.
    """

    donor: Checkpoint
    sections: list[Section] = field(default_factory=list)
    rest: list[Checkpoint] = field(default_factory=list)

    def names(self) -> list[str]:
        """Every name that a filter may hold a part of: those of the output, and of its inputs."""
        inputs = [i for s in self.sections for i in s.inputs]
        return list(dict.fromkeys(n for i in inputs for n in (*i.view, *(i.names or {}).values())))

    def unused(self) -> dict[str, str]:
        """Tensors of models of which the recipe takes other parts, with that for a reason."""
        if any(s.inputs[0].names is None or not s.whole for s in self.sections):
            return {}  # of whole models all is used; layers that no slice takes go without saying
        used: dict[str, set[str]] = {}
        models: dict[str, Checkpoint] = {}
        for section in self.sections:
            for found in (*section.inputs, *([section.base] if section.base else [])):
                models[found.model.label] = found.model
                used.setdefault(found.model.label, set()).update(map(found.own_name, found.view))
        return {
            name: f"the recipe takes other parts of {short(label)}"
            for label, model in models.items()
            if not model.same_as(self.donor)
            for name in model.tensors
            if name not in used[label]
        }

    def relayer(self, stack: str, count: int, layers: Sequence[Origin], notes: list[str]) -> None:
        """Let the donor's config follow a stack that was put together anew."""
        if not self.donor.side.config:
            return
        changed = relayer(self.donor.side.config, stack, count, layers)
        if not changed.counted and len(layers) != count:
            notes.append(
                f"config.json: nothing there counts the {count} layers of {stack}, so it does not"
                f" say that there are {len(layers)} now; set the count by hand"
            )
        if changed.unsure:
            notes.append(
                "config.json: check "
                + ", ".join(changed.unsure)
                + ", which describe the layers by rules that the new order may not follow"
            )
        side = self.donor.side.with_config(changed.config)
        self.donor = replace(self.donor, side=side)


@dataclass(frozen=True, slots=True)
class Opening:
    """Opens the models that a stage names.

    donor: whose tree and side files are the result's. modules: those that the stage has by name.
    """

    stage: RecipeModel
    reader: Reader
    open_at: OpenAt
    donor: Checkpoint
    modules: tuple[str, ...] = ()

    def base(self, place: Place = (), own: Reference | None = None) -> Checkpoint | None:
        """The base model, or the slice's ``own``; None where there is none."""
        if own is not None:
            return self.open_at(own, (*place, "base_model"))
        reference = self.stage.base_model
        return None if reference is None else self.open_at(reference, ("base_model",))

    def input(self, entry: ModelEntry | SourceEntry, place: Place, names_of: NamesOf) -> Input:
        """The model of an entry, of which ``names_of`` says what is taken."""
        model = self.open_at(entry.model, (*place, "model"))
        own = self.reader.level(f"parameters of {entry.model}", place, entry.parameters, own=True)
        span = entry.layer_range if isinstance(entry, SourceEntry) else None
        found = viewed(str(entry.model), model, names_of(model), own, span)
        if entry.statistics is None:
            return found
        known = self.open_at(entry.statistics, (*place, "statistics"))
        names = names_of(known)
        return replace(found, statistics=known if names is None else select(known, names))

    def names(self, model: Checkpoint, module: str | None) -> list[str]:
        """The tensors of a model, or of one module of it."""
        if module is None:
            return list(model.tensors)
        return modules_of(model.tensors, self.modules)[module]


def viewed(
    called: str,
    model: Checkpoint,
    names: Mapping[str, str] | None,
    own: Level | None = None,
    span: tuple[int, int] | None = None,
) -> Input:
    """``model`` as an input of which the tensors ``names`` are taken."""
    view = model if names is None else select(model, names)
    return Input(called, model, view, own, names, span=span)
