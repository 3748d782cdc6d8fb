"""Which models a stage is made of, through the stages that it uses, and what each is to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from merge.ir.checkpoint import Checkpoint
from merge.recipe.explain import Made
from merge.recipe.levels import Level
from merge.recipe.sections import Input

__all__ = ["GIVES_NO_WEIGHTS", "Used", "donor_of", "fixed", "stages_of", "used_models"]

GIVES_NO_WEIGHTS = "config and tokenizer"
"""The role of a base that a method without a base was given."""


@dataclass(frozen=True, slots=True)
class Used:
    """A model by its name in the recipe. levels: its own parameters wherever it is listed.

    roles: model, base, statistics, or what else it gives. spans: the layers that are taken of it,
    where it is taken in slices.
    """

    called: str
    model: Checkpoint
    roles: dict[str, None] = field(default_factory=dict)
    levels: list[Level] = field(default_factory=list)
    spans: dict[tuple[int, int], None] = field(default_factory=dict)


def stages_of(made: Sequence[Made], this: Made) -> list[Made]:
    """``this`` and the stages that it is made of, in the order in which they were compiled."""
    by_name = {m.stage.name: m for m in made}
    todo = [this]
    for stage in todo:
        for found, _ in _parts(stage):
            inner = by_name.get(found.called)
            if inner is not None and not any(inner is t for t in todo):
                todo.append(inner)
    return [m for m in made if any(m is t for t in todo)]


def used_models(made: Sequence[Made], this: Made) -> list[Used]:
    """The models that ``this`` is made of, each once, in the order of the stages; no stages."""
    names = {m.stage.name for m in made}
    out: dict[str, Used] = {}
    for stage in stages_of(made, this):
        for found, role in _parts(stage):
            if found.called not in names:
                used = out.setdefault(found.called, Used(found.called, found.model))
                used.roles[role] = None
                used.levels.extend([found.own] if found.own is not None else [])
                used.spans.update({found.span: None} if found.span is not None else {})
            if (known := found.statistics) is not None:
                out.setdefault(known.label, Used(known.label, known)).roles["statistics"] = None
    donor, model = donor_of(made, this)
    out.setdefault(donor, Used(donor, model, {GIVES_NO_WEIGHTS: None}))
    return list(out.values())


def _parts(made: Made) -> Iterator[tuple[Input, str]]:
    """The inputs of every section with their roles, a section's base first."""
    donor_only = made.reader.method.base == "donor"
    for section, operands in zip(made.assembly.sections, made.operands, strict=True):
        base = section.base
        if base is not None and donor_only:
            yield base, "model" if any(o is base for o in operands) else GIVES_NO_WEIGHTS
        elif base is not None:
            yield base, "base"
        for found in section.inputs:
            if donor_only or base is None or not found.stands_for(base):
                yield found, "model"


def donor_of(made: Sequence[Made], this: Made) -> tuple[str, Checkpoint]:
    """Name and checkpoint of the model that gives ``this`` config and tokenizer, through stages."""
    by_name = {m.stage.name: m for m in made}
    while True:
        donor, section = this.assembly.donor, this.assembly.sections[0]
        base = this.stage.model.base_model
        called = section.inputs[0].called if base is None else str(base)
        if this.stage.model.scope is not None:  # the donor is the one that holds more
            called = next((i.called for i in section.inputs if i.model.same_as(donor)), called)
        if (inner := by_name.get(called)) is None:
            return called, donor
        this = inner


def fixed(levels: Sequence[Level]) -> dict[str, object]:
    """Parameters that have one value at all ``levels``; None for those that vary.

    A gradient varies, and so does a value for some tensors only.
    """
    out: dict[str, object] = {}
    for key in dict.fromkeys(k for level in levels for k in level.values):
        values = [level.values.get(key) for level in levels]
        constants = [None if v is None else v.constant for v in values]
        out[key] = constants[0] if all(c == constants[0] for c in constants) else None
    return out
