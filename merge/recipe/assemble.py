"""The sections of a stage: from its models, its slices, or those of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from merge.families.layers import Layers, place_of
from merge.families.modules import modules_of
from merge.ir.checkpoint import REBUILT, Checkpoint
from merge.recipe.document import Place
from merge.recipe.levels import Level, Reader
from merge.recipe.schema import ModelEntry, ModuleEntry, RecipeModel, SliceEntry
from merge.recipe.sections import Assembly, OpenAt, Opening, Section, viewed
from merge.recipe.slices import Sliced, find_stack, slice_up

__all__ = ["assemble"]


def assemble(model: RecipeModel, reader: Reader, open_at: OpenAt) -> Assembly:
    """Every model opened, every range checked. The base is the donor, else the first model."""
    opening = Opening(model, reader, open_at, tuple(model.modules or ()))
    top = reader.level("the recipe's parameters", (), model.parameters)
    if model.modules is not None:
        return _of_modules(opening, model.modules, top)
    if model.slices is not None:
        return _of_slices(opening, None, model.slices, (), (top,), None)
    section = _of_models(opening, model.models or [], (), (top,), None)
    return Assembly((section.base or section.inputs[0]).model, [section])


def _of_models(
    opening: Opening,
    entries: Sequence[ModelEntry],
    place: Place,
    shared: tuple[Level, ...],
    module: str | None,
) -> Section:
    """Whole models, or one module of each."""

    def taken(model: Checkpoint) -> Mapping[str, str] | None:
        return None if module is None else {n: n for n in opening.names(model, module)}

    inputs = []
    for i, entry in enumerate(entries):
        at: Place = (*place, "models", i)
        if entry.layer_range is not None:
            line = opening.reader.line((*at, "layer_range"))
            opening.reader.notes.append(
                f"line {line}: 'layer_range' is ignored: models are merged whole, slices by layers"
            )
        inputs.append(opening.input(entry, at, taken))
    found = opening.base()
    called = str(opening.stage.base_model)
    base = None if found is None else viewed(called, found, taken(found))
    layers = Layers.of((base or inputs[0]).view.tensors)
    return Section(tuple(inputs), base, shared, layers.position, (*place, "models"))


def _of_slices(
    opening: Opening,
    assembly: Assembly | None,
    entries: Sequence[SliceEntry],
    place: Place,
    shared: tuple[Level, ...],
    module: str | None,
) -> Assembly:
    """The slices added to ``assembly``, whose donor's config follows."""
    sliced = slice_up(opening, entries, place, shared, module)
    if assembly is None:
        assembly = Assembly(opening.base() or sliced.sections[0].inputs[0].model)
    assembly.sections += sliced.sections
    stack = find_stack(opening, assembly.donor, module, (*place, "slices", 0))
    count = Layers.of(opening.names(assembly.donor, module)).stacks[stack]
    assembly.relayer(stack, count, sliced.layers, opening.reader.notes)
    _check_outside(opening, assembly.donor, module, sliced, (*place, "slices"))
    return assembly


def _check_outside(
    opening: Opening, donor: Checkpoint, module: str | None, sliced: Sliced, place: Place
) -> None:
    """The ends of the result hold what the donor's config speaks of.

    Where one model has a head of its own and another shares it with the embeddings, the last slice
    may bring a head that the config does without, or none where the config wants one.
    """

    def outside(names: Iterable[str]) -> list[str]:
        return [n for n in names if place_of(n) is None and not n.endswith(REBUILT)]

    wanted = outside(opening.names(donor, module))
    found = outside(n for s in sliced.sections for n in s.inputs[0].view)
    missing = [n for n in wanted if n not in found and n not in donor.tied]
    if missing:
        raise opening.reader.document.error(
            "the first and the last slice do not hold all tensors that the config speaks of",
            place,
            found=f"no {', '.join(missing[:4])}",
            expected=f"the tensors before and after the layers as in {donor.label}",
            do="take the last slice, or config and base_model, from a model of the other kind",
        )
    if extra := [n for n in found if n not in wanted]:
        opening.reader.notes.append(
            f"config.json is that of {donor.label}, which has no {', '.join(extra[:4])}: check"
            " that it lets the model use them (tie_word_embeddings, for a head)"
        )


def _of_modules(opening: Opening, modules: Mapping[str, ModuleEntry], top: Level) -> Assembly:
    base = opening.base()
    assembly = None if base is None else Assembly(base)
    for name, entry in modules.items():
        place: Place = ("modules", name)
        shared = (
            opening.reader.level(f"parameters of module {name}", place, entry.parameters),
            top,
        )
        at: Place = (*place, "models", 0) if entry.models else (*place, "slices", 0, "sources", 0)
        first = entry.models or (entry.slices or [])[0].sources
        _check_module(opening, name, opening.open_at(first[0].model, (*at, "model")))
        if entry.slices is not None:
            assembly = _of_slices(opening, assembly, entry.slices, place, shared, name)
            continue
        section = _of_models(opening, entry.models or [], place, shared, name)
        assembly = assembly or Assembly(section.inputs[0].model)
        assembly.sections.append(section)
    assert assembly is not None, "modules are not empty"
    taken = modules_of(assembly.donor.tensors, opening.modules).values()
    known = {n for names in taken for n in names}
    assembly.rest = [n for n in assembly.donor.tensors if n not in known]
    if assembly.rest:
        opening.reader.notes.append(
            f"{len(assembly.rest)} tensors belong to no module of the recipe and are taken from"
            f" {assembly.donor.label}: {', '.join(assembly.rest[:3])}"
        )
    return assembly


def _check_module(opening: Opening, name: str, model: Checkpoint) -> None:
    """The module has tensors in the model."""
    if not opening.names(model, name):
        heads = dict.fromkeys(n.partition(".")[0] for n in model.tensors)
        parts = [*Layers.of(model.tensors).stacks, *heads]
        raise opening.reader.document.error(
            f"no tensor of {model.label} belongs to module {name!r}",
            ("modules", name),
            key=name,
            expected=f"a part of its tensors' names, such as {', '.join(parts[:8])}",
        )
