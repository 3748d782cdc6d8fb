"""Coefficients that ``learn:`` puts in the place of a stage's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from merge.errors import MergeError, RecipeError
from merge.ir.checkpoint import Checkpoint
from merge.learning.coefficients import Block, Coefficients
from merge.learning.settings import settings_of
from merge.recipe.explain import Made
from merge.recipe.learn_words import LearnEntry

__all__ = ["COEFFICIENTS", "TASKS", "Found", "Learner", "learn_coefficients", "names_of"]

COEFFICIENTS = "coefficients.json"
TASKS = "tasks"
"""The folder of an output in which each task has a folder with tensors of its own."""

_METHODS = ("task_arithmetic", "tsv")
"""Methods whose result is a sum of parts, one of each model, times a coefficient."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A merge with learned coefficients. tensors: those that have some. told: in words what was
    found. side: the files that tell it, by their paths in the output."""

    checkpoint: Checkpoint
    tensors: Collection[str]
    told: str
    side: Mapping[str, str | bytes]


class Learner(Protocol):
    """Learns what a recipe leaves to data, or applies what was learned."""

    def learn(
        self,
        experts: Mapping[str, Checkpoint],
        base: Checkpoint,
        how: LearnEntry,
        start: Coefficients,
        seed: int,
    ) -> Found:
        """The merge, and what was found."""


def learn_coefficients(
    made: Made, merged: Checkpoint, learner: Learner | None, seed: int, notes: list[str]
) -> Checkpoint:
    """The stage's result with learned coefficients; as it is written where ``learner`` is None.

    The files that tell what was learned are put into ``made.side``.
    """
    stage = made.stage
    how = stage.model.learn
    if how is None:
        return merged
    _check(made)
    where = stage.document.where(("learn",))
    try:
        settings = settings_of(how.preset, how.how)
    except RecipeError as error:
        key = str(error.where.get("key", ""))
        raise error.at(**stage.document.where(("learn", key))) from None
    names = names_of(made)
    if learner is None:
        notes.append(f"line {where['line']}: {_planned(how, names, settings.steps)}")
        return merged
    experts = {n: o.view for n, o in zip(names, made.operands[0], strict=True)}
    base = made.assembly.sections[0].base
    assert base is not None
    try:
        found = learner.learn(experts, base.view, how, _start(made, merged), seed)
    except MergeError as error:
        key = str(error.where.get("key", ""))
        raise error.at(**stage.document.where(("learn", key))) from None
    made.side.update(found.side)
    notes.append(f"line {where['line']}: {found.told}")
    learned = found.checkpoint.tensors  # others, such as heads, are as the recipe has them
    tensors = {n: learned[n] if n in found.tensors else e for n, e in merged.tensors.items()}
    tensors |= {n: tensors[first] for n, first in merged.tied.items()}
    return replace(merged, tensors=tensors)


def names_of(made: Made) -> list[str]:
    """The experts' names: the last part of each model's path, or the whole where two are alike."""
    whole = [o.called for o in made.operands[0]]
    short = [w.replace("\\", "/").rstrip("/").rpartition("/")[2] or w for w in whole]
    return short if len(set(short)) == len(short) else whole


def _check(made: Made) -> None:
    stage, model = made.stage, made.stage.model

    def wrong(what: str, **parts: str) -> RecipeError:
        return stage.document.error(what, ("learn",), key="learn", **parts)

    if model.models is None or model.scope is not None:
        raise wrong(
            "coefficients are learned of whole models",
            found="a scope" if model.models is not None else "slices or modules",
            expected="models",
        )
    if model.merge_method not in _METHODS:
        raise wrong(
            "coefficients are learned of a sum of differences",
            found=model.merge_method,
            expected=" or ".join(_METHODS),
            do="write merge_method: task_arithmetic, and in learn: such as prepare: ties:0.2",
        )
    how = model.learn
    assert how is not None
    if (how.data is None) == (how.coefficients is None):
        raise wrong(
            "both data and coefficients are given"
            if how.data is not None
            else "it is not said what coefficients are learned on",
            expected="data: ... of each model's task, or coefficients: a file",
        )
    if how.tasks is not None and how.coefficients is None:
        raise wrong(
            "tensors of tasks are taken together with coefficients",
            found=f"tasks: {how.tasks}",
            do="give coefficients: the file beside that folder",
        )


def _planned(how: LearnEntry, names: list[str], steps: int) -> str:
    who = ", ".join(names)
    if how.coefficients is not None:
        return f"coefficients of {how.coefficients} are taken when the recipe is applied, for {who}"
    data = ", ".join(e.path for e in (how.data or {}).values())
    preset = "" if how.preset is None else f" by {how.preset}"
    return (
        f"coefficients of {who} are learned{preset} when the recipe is applied, in {steps} steps"
        f" on {data}; here they are as written"
    )


def _start(made: Made, merged: Checkpoint) -> Coefficients:
    """The stage's own coefficients, tensor by tensor: learning starts from what is written."""
    section, operands = made.assembly.sections[0], made.operands[0]
    method = made.reader.method
    blocks: dict[str, Block] = {}
    for name, expr in merged.tensors.items():
        if name in merged.tied or expr.dtype.kind != "float":
            continue
        given: dict[str, Any] = {
            spec.argument: tuple(c.value for c in choices) if spec.per_model else choices[0].value
            for spec, choices in made.choices(section, operands, name)
        }
        if method.coefficients:
            taken = {k: v for k, v in given.items() if k in method.takes}
            row = [float(c) for c in method.function(**taken)]
        else:
            row = [float(given["lambda_"])] * len(operands)
        blocks[name] = Block((name,), tuple((c,) for c in row))
    prepare = "none" if method.coefficients else f"tsv:{1 / len(operands)!r}"
    return Coefficients(tuple(names_of(made)), blocks, prepare, "tensor")
