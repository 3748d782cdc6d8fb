"""Recipe to IR: open the models, resolve every parameter for every tensor, apply the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from merge import methods
from merge.errors import MergeError, RecipeError, nearest
from merge.families.layers import Layers
from merge.ir.checkpoint import Checkpoint
from merge.ir.merging import merge_checkpoints
from merge.methods.core.schema import Method, ParameterSpec
from merge.recipe.document import Place
from merge.recipe.schema import Recipe
from merge.recipe.values import Value, parse_value

__all__ = ["Compiled", "compile_recipe"]

Opener = Callable[[str], Checkpoint]


@dataclass(frozen=True, slots=True)
class Compiled:
    """The checkpoint that a recipe describes, and what its author may want to know."""

    checkpoint: Checkpoint
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Input:
    """One operand: its model and the levels at which its parameters may stand, highest first."""

    reference: str
    checkpoint: Checkpoint
    levels: tuple[Mapping[str, Value], ...]


def compile_recipe(recipe: Recipe, opener: Opener, *, seed: int | None = None) -> Compiled:
    """The checkpoint of ``recipe``. ``opener`` turns a model reference into a checkpoint.

    ``seed`` overrides the recipe's. Every error names the recipe's line and column.
    """
    model, document = recipe.model, recipe.document
    method = methods.get(model.merge_method)
    notes = [f"{where} is not known and is ignored" for where in recipe.ignored]
    opened: dict[str, Checkpoint] = {}

    def open_at(reference: str, place: Place) -> Checkpoint:
        if reference not in opened:
            try:
                opened[reference] = opener(reference)
            except MergeError as error:
                raise error.at(**document.where(place)) from None
        return opened[reference]

    shared = _level(recipe, ("parameters",), model.parameters, method, notes)
    inputs = []
    for i, entry in enumerate(model.models):
        place: Place = ("models", i)
        own = _level(recipe, (*place, "parameters"), entry.parameters, method, notes, own=True)
        checkpoint = open_at(entry.model, (*place, "model"))
        inputs.append(_Input(entry.model, checkpoint, (own, shared)))
    base = None if model.base_model is None else open_at(model.base_model, ("base_model",))
    operands = _operands(recipe, method, inputs, base, shared, notes)

    for value in (v for level in (shared, *(i.levels[0] for i in inputs)) for v in level.values()):
        for text, place in value.unmatched(inputs[0].checkpoint.tensors):
            line = document.where(place)["line"]
            notes.append(f"line {line}: no tensor's name holds the filter {text!r}")

    layers = Layers.of((base or inputs[0].checkpoint).tensors)

    def arguments(name: str) -> dict[str, Any]:
        depth = layers.position(name)
        return {
            s.argument: tuple(_resolve(recipe, method, s, i.levels, name, depth) for i in operands)
            if s.per_model
            else _resolve(recipe, method, s, (shared,), name, depth)
            for s in method.parameters.values()
        }

    try:
        merged = merge_checkpoints(
            method,
            [i.checkpoint for i in operands],
            base,
            arguments,
            model.seed if seed is None else seed,
        )
    except MergeError as error:
        raise error.at(**document.where(("merge_method",))) from None
    dtype = model.out_dtype or model.dtype
    labels = ", ".join(i.reference for i in operands)
    over = "" if base is None else f" over {model.base_model}"
    merged = replace(merged, label=f"{method.name} of {labels}{over}")
    return Compiled(merged if dtype is None else merged.cast(dtype), tuple(notes))


def _level(
    recipe: Recipe,
    place: Place,
    raw: Mapping[str, object],
    method: Method,
    notes: list[str],
    *,
    own: bool = False,
) -> dict[str, Value]:
    """The parameters at one place, checked against the method; those of others are noted."""
    document = recipe.document
    out: dict[str, Value] = {}
    for key, value in raw.items():
        at = (*place, key)
        if key not in method.parameters:
            line = document.where(at)["line"]
            others = [m.name for m in methods.registry().values() if key in m.parameters]
            if not others and recipe.lenient:
                notes.append(f"line {line}: {key!r} is not known and is ignored")
                continue
            if not others:
                everything = {k for m in methods.registry().values() for k in m.parameters}
                near = nearest(key, method.parameters) or nearest(key, sorted(everything))
                raise document.error(
                    f"unknown parameter {key!r}",
                    at,
                    key=key,
                    expected=f"one of {', '.join(method.parameters) or '(none)'}",
                    do=f"did you mean {near!r}?" if near else f"see `merge methods {method.name}`",
                )
            notes.append(
                f"line {line}: {key!r} is ignored: {method.name} has no such parameter"
                f" ({', '.join(others[:3])} has)"
            )
            continue
        spec = method.parameters[key]
        if own and not spec.per_model:
            line = document.where(at)["line"]
            notes.append(
                f"line {line}: {key!r} is ignored under a model: it is one value for the whole"
                " merge, written under the recipe's own parameters"
            )
            continue
        parsed = parse_value(value, at, document)
        if parsed is None:
            continue
        out[key] = parsed.convert(partial(_coerce, recipe, spec))
    return out


def _coerce(recipe: Recipe, spec: ParameterSpec, scalar: object, place: Place) -> Any:
    if scalar is None:
        return None
    try:
        return spec.coerce(scalar)
    except RecipeError as error:
        raise error.at(**recipe.document.where(place)) from None


def _resolve(
    recipe: Recipe,
    method: Method,
    spec: ParameterSpec,
    levels: tuple[Mapping[str, Value], ...],
    name: str,
    depth: float,
) -> Any:
    """The value of one parameter for one tensor: the highest level that says something."""
    for level in levels:
        if spec.key not in level:
            continue
        found = level[spec.key].at(name, depth)
        if found is not None and found[0] is not None:
            return _coerce(recipe, spec, found[0], found[1])
    if spec.required:
        raise RecipeError(
            f"method {method.name!r} needs parameter {spec.key!r}"
            + (" for every model" if spec.per_model else ""),
            key=spec.key,
            tensor=name,
            expected=f"a value in {spec.range}",
            do="write it under the recipe's parameters" + (" or each model" * spec.per_model),
        )
    return spec.default


def _operands(
    recipe: Recipe,
    method: Method,
    inputs: list[_Input],
    base: Checkpoint | None,
    shared: Mapping[str, Value],
    notes: list[str],
) -> list[_Input]:
    """Which of the listed models the method works on, given what a base is to it."""
    model, document = recipe.model, recipe.document
    others = [i for i in inputs if i.reference != model.base_model]
    listed = len(others) < len(inputs)
    if method.base == "required":
        if base is None:
            raise document.error(
                f"method {method.name!r} needs a base_model",
                ("merge_method",),
                key="base_model",
                expected="the model that the others were fine-tuned from",
            )
        return others
    if base is None:
        return inputs
    if method.base == "first operand":
        first = [i for i in inputs if i.reference == model.base_model]
        return [*(first or [_Input(str(model.base_model), base, (shared,))]), *others]
    if listed:
        return inputs
    if "weight" in method.parameters and "weight" in shared:
        # mergekit counts an unlisted base as one more model, when it has a weight from above
        notes.append(f"base_model {model.base_model} is averaged in, with the recipe's weight")
        return [*inputs, _Input(str(model.base_model), base, (shared,))]
    notes.append(
        f"base_model {model.base_model} gives config and tokenizer only: {method.name} has no base"
    )
    return inputs
