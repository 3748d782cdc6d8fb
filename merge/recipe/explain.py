"""Why a parameter has the value it has, for one tensor: level, filter, point of a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merge.errors import PlanError, nearest
from merge.methods.core.schema import ParameterSpec
from merge.recipe.levels import Choice, Level, Reader
from merge.recipe.read import Stage
from merge.recipe.sections import Assembly, Input, Section

__all__ = ["Explanation", "Made", "Reason", "explain"]


@dataclass(frozen=True, slots=True)
class Made:
    """How a stage was compiled: its sections with the operands of the method in each."""

    stage: Stage
    reader: Reader
    assembly: Assembly
    operands: list[list[Input]]

    def choices(
        self, section: Section, operands: Sequence[Input], name: str
    ) -> Iterator[tuple[ParameterSpec, list[Choice]]]:
        """For each parameter its value for the tensor ``name``: one, or one an operand."""
        depth = section.depth(name)
        for spec in self.reader.method.parameters.values():
            if not spec.per_model:
                yield spec, [self.reader.choose(spec, section.shared, name, depth)]
            else:
                yield (
                    spec,
                    [
                        self.reader.choose(spec, _levels(o, section), o.own_name(name), depth)
                        for o in operands
                    ],
                )


def _levels(operand: Input, section: Section) -> tuple[Level, ...]:
    return section.shared if operand.own is None else (operand.own, *section.shared)


@dataclass(frozen=True, slots=True)
class Reason:
    """One parameter's value. ``model``: whose, for a per-model parameter."""

    parameter: str
    model: str | None
    value: object
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """One tensor in one stage: which tensors of which models, and with which values."""

    tensor: str
    stage: str | None
    method: str
    depth: float
    inputs: tuple[str, ...]
    base: str | None
    reasons: tuple[Reason, ...]


def explain(made: Sequence[Made], tensor: str) -> list[Explanation]:
    """What each stage does to ``tensor``, the result's first; PlanError when there is none."""
    by_name = {m.stage.name: m for m in made}
    todo, out = [(made[-1], tensor)], list[Explanation]()
    while todo:
        stage, name = todo.pop(0)
        found = _find(stage, name)
        if found is None and name in stage.assembly.rest:
            continue
        if found is None:
            every = [n for s in stage.assembly.sections for n in s.inputs[0].view]
            near = nearest(name, every)
            raise PlanError(
                "the result has no such tensor",
                tensor=name,
                do=f"did you mean {near!r}?" if near else "see `merge plan --tensors`",
            )
        section, operands = found
        out.append(_explanation(stage, section, operands, name))
        for used in [*operands, *([section.base] if section.base else [])]:
            inner = by_name.get(used.called)
            step = (inner, used.own_name(name))
            if inner is not None and step not in todo:
                todo.append((inner, used.own_name(name)))
    return out


def _find(made: Made, name: str) -> tuple[Section, list[Input]] | None:
    for section, operands in zip(made.assembly.sections, made.operands, strict=True):
        if name in section.inputs[0].view.tensors:
            return section, operands
    return None


def _explanation(made: Made, section: Section, operands: list[Input], name: str) -> Explanation:
    depth = section.depth(name)
    reasons = []
    for spec, choices in made.choices(section, operands, name):
        owners = operands if spec.per_model else [None]
        for owner, choice in zip(owners, choices, strict=True):
            seen = name if owner is None else owner.own_name(name)
            why = _why(made.reader, choice, spec.key, seen, depth)
            model = None if owner is None else owner.called
            reasons.append(Reason(spec.key, model, choice.value, why))
    return Explanation(
        name,
        made.stage.name,
        made.reader.method.name,
        depth,
        tuple(f"{o.called}[{o.own_name(name)}]" for o in operands),
        None if section.base is None else section.base.called,
        tuple(reasons),
    )


def _why(reader: Reader, choice: Choice, key: str, name: str, depth: float) -> str:
    if choice.level is None or choice.place is None:
        return "default"
    how = choice.level.values[key].how(name, depth)
    return f"line {reader.line(choice.place)}, {choice.level.called}" + (f": {how}" if how else "")
