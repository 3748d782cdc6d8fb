"""The sections of a stage: from its models, its slices, or those of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from merge.errors import hint
from merge.families.layers import Layers, place_of
from merge.families.modules import modules_of
from merge.ir.align import is_rebuilt, some
from merge.ir.assembly import select
from merge.ir.checkpoint import Checkpoint
from merge.recipe.document import Place
from merge.recipe.levels import Level, Reader
from merge.recipe.schema import ModelEntry, ModuleEntry, RecipeModel, SliceEntry
from merge.recipe.sections import Assembly, Opening, Section, viewed
from merge.recipe.slices import Sliced, find_stack, slice_up
from merge.recipe.together import Inputs, part_names

__all__ = ["assemble"]


def assemble(model: RecipeModel, reader: Reader, inputs: Inputs) -> Assembly:
    """The sections of a stage; every range is checked."""
    parts = tuple(model.modules or ()) if model.scope is None else (model.scope,)
    opening = Opening(model, reader, lambda r, _: inputs.models[r], inputs.donor, parts)
    top = reader.level("the recipe's parameters", (), model.parameters)
    assembly = Assembly(inputs.donor)
    if model.modules is not None:
        _add_modules(opening, assembly, model.modules, top)
    elif model.slices is not None:
        _add_slices(opening, assembly, model.slices, (), (top,), None)
    else:
        _check_part(opening, model.scope, inputs.donor, ("scope",))
        section = _of_models(opening, model.models or [], (), (top,), model.scope)
        assembly.sections.append(section)
        if model.scope is not None:
            _take_rest(opening, assembly)
    if inputs.heads is not None:
        assembly.rest.append(inputs.heads)
    return assembly


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
    donor = opening.donor if opening.stage.scope is not None else None
    names = None if donor is None else taken(donor)
    return Section(
        tuple(inputs),
        base,
        shared,
        layers.position,
        (*place, "models"),
        donor=donor if donor is None or names is None else select(donor, names),
    )


def _add_slices(
    opening: Opening,
    assembly: Assembly,
    entries: Sequence[SliceEntry],
    place: Place,
    shared: tuple[Level, ...],
    module: str | None,
) -> None:
    """The slices added to ``assembly``, whose donor's config follows."""
    sliced = slice_up(opening, entries, place, shared, module)
    assembly.sections += sliced.sections
    stack = find_stack(opening, assembly.donor, module, (*place, "slices", 0))
    count = Layers.of(opening.names(assembly.donor, module)).stacks[stack]
    assembly.relayer(stack, count, sliced.layers, opening.reader.notes)
    _check_outside(opening, assembly, module, sliced, (*place, "slices"))


def _check_outside(
    opening: Opening, assembly: Assembly, module: str | None, sliced: Sliced, place: Place
) -> None:
    """The ends of the result hold what the donor's config speaks of, in its shapes.

    What the ends lack is the donor's, where ``missing`` allows that.
    """

    def outside(names: Iterable[str]) -> list[str]:
        return [n for n in names if place_of(n) is None and not is_rebuilt(n)]

    donor, document = assembly.donor, opening.reader.document
    wanted = outside(opening.names(donor, module))
    views = [s.inputs[0].view.tensors for s in sliced.sections]
    found = {n: view[n].shape for view in views for n in outside(view)}
    missing = [n for n in wanted if n not in found and n not in donor.tied]
    if missing and opening.stage.missing != "error":
        assembly.rest.append(select(donor, {n: n for n in missing}))
    elif missing:
        raise document.error(
            "the first and the last slice do not hold all tensors that the config speaks of",
            place,
            found=f"no {some(missing)}",
            expected=f"the tensors before and after the layers as in {donor.label}",
            do="take the last slice, or config and base_model, from a model of the other kind;"
            " or write 'missing: base', and they are that model's",
        )
    for name in wanted:
        if found.get(name, shape := donor.tensors[name].shape) != shape:
            raise document.error(
                "the slices end in a tensor of another shape than the config speaks of",
                place,
                tensor=name,
                found=f"{list(found[name])}",
                expected=f"{list(shape)}, as in {donor.label}",
                do="for heads of tasks say whose the result's are: 'heads: base' or a model's name;"
                " for vocabularies, 'tokenizer_source: union' puts them together",
            )
    if extra := [n for n in found if n not in wanted]:
        opening.reader.notes.append(
            f"config.json is that of {donor.label}, which has no {some(extra)}: check that it lets"
            " the model use them"
        )


def _add_modules(
    opening: Opening, assembly: Assembly, modules: Mapping[str, ModuleEntry], top: Level
) -> None:
    for name, entry in modules.items():
        place: Place = ("modules", name)
        shared = (
            opening.reader.level(f"parameters of module {name}", place, entry.parameters),
            top,
        )
        first = entry.models or (entry.slices or [])[0].sources
        _check_part(opening, name, opening.open_at(first[0].model, (*place, 0, "model")), place)
        if entry.slices is not None:
            _add_slices(opening, assembly, entry.slices, place, shared, name)
        else:
            section = _of_models(opening, entry.models or [], place, shared, name)
            assembly.sections.append(section)
    _take_rest(opening, assembly)


def _take_rest(opening: Opening, assembly: Assembly) -> None:
    """What belongs to no module, or not to the scope, is the donor's as it is."""
    donor = opening.donor
    taken = modules_of(donor.tensors, opening.modules).values()
    known = {n for names in taken for n in names}
    rest = [n for n in donor.tensors if n not in known]
    if not rest:
        return
    assembly.rest.append(select(donor, {n: n for n in rest}))
    what = "no module of the recipe"
    if opening.stage.scope is not None:
        what = f"no part of the scope {opening.stage.scope!r}"
    opening.reader.notes.append(
        f"{len(rest)} tensors belong to {what} and are taken from {donor.label}:"
        f" {', '.join(rest[:3])}"
    )


def _check_part(opening: Opening, name: str | None, model: Checkpoint, place: Place) -> None:
    """The module, or the scope, has tensors in the model."""
    if name is not None and not opening.names(model, name):
        known = part_names(model)
        raise opening.reader.document.error(
            f"no tensor of {model.label} belongs to {str(place[0]).rstrip('s')} {name!r}",
            place,
            key=name,
            expected=f"a part of its tensors' names, such as {', '.join(known[:8])}",
            do=hint(name, known),
        )
