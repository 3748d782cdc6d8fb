"""Why a parameter has the value it has, for one tensor: level, filter, point of a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from merge.errors import PlanError, RecipeError, nearest
from merge.ir.checkpoint import Checkpoint
from merge.methods.core.schema import ParameterSpec
from merge.recipe.levels import Choice, Reader
from merge.recipe.read import Stage
from merge.recipe.sections import Assembly, Input, Section

__all__ = ["Explanation", "Made", "Reason", "explain"]


@dataclass(frozen=True, slots=True)
class Made:
    """How a stage was compiled: for each section the method's operands, and what they make.

    side: further files of the output, by name.
    """

    stage: Stage
    reader: Reader
    assembly: Assembly
    operands: list[list[Input]] = field(default_factory=list)
    parts: list[Checkpoint] = field(default_factory=list)
    side: dict[str, str | bytes] = field(default_factory=dict)

    def choices(
        self, section: Section, operands: Sequence[Input], name: str
    ) -> Iterator[tuple[ParameterSpec, list[Choice]]]:
        """For each parameter its value for the tensor ``name``: one, or one an operand."""
        depth = section.depth(name)
        for spec in self.reader.method.parameters.values():
            if not spec.per_model:
                yield spec, [self.reader.choose(spec, section.shared, name, depth)]
            else:
                yield spec, [self._own(spec, section, o, name, depth) for o in operands]

    def _own(
        self, spec: ParameterSpec, section: Section, operand: Input, name: str, depth: float
    ) -> Choice:
        own = () if operand.own is None else (operand.own,)
        try:
            return self.reader.choose(spec, (*own, *section.shared), operand.own_name(name), depth)
        except RecipeError as error:
            raise error.at(model=operand.called) from None


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
    """What each stage does to ``tensor``, the result's (the last one's) first.

    PlanError when the result has no such tensor.
    """
    by_name = {m.stage.name: m for m in made}
    todo, out = [(made[-1], tensor)], list[Explanation]()
    for stage, name in todo:
        if (found := _find(stage, name)) is not None:
            section, every = found
            operands = [o for o in every if name in o.view]
            if len(operands) < len(every) and stage.stage.model.missing == "base":
                taken = (f"{stage.assembly.donor.label}[{name}]",)
                out.append(
                    Explanation(name, stage.stage.name, "missing: base", 0.0, taken, None, ())
                )
                continue
            out.append(_explanation(stage, section, operands, name))
            for used in [*operands, *([section.base] if section.base else [])]:
                inner = by_name.get(used.called)
                if inner is not None and (step := (inner, used.own_name(name))) not in todo:
                    todo.append(step)
        elif (donor := next((r for r in stage.assembly.rest if name in r), None)) is not None:
            taken = (f"{donor.label}[{name}]",)
            out.append(Explanation(name, stage.stage.name, "no module", 0.0, taken, None, ()))
        elif not out:
            raise _unknown(stage, name)
    return out


def _unknown(made: Made, name: str) -> PlanError:
    every = [n for part in [*made.parts, *made.assembly.rest] for n in part]
    near = nearest(name, every) or next((n for n in every if name in n), None)
    return PlanError(
        "the result has no such tensor",
        tensor=name,
        do=f"did you mean {near!r}?" if near else "see `merge plan --tensors`",
    )


def _find(made: Made, name: str) -> tuple[Section, list[Input]] | None:
    """The section of the output that holds the tensor, with its operands."""
    for section, operands, part in zip(
        made.assembly.sections, made.operands, made.parts, strict=True
    ):
        if name in part:
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
    place = ".".join(map(str, choice.place))
    overridden = [s for s in reader.stage.settings if f"{place}.".startswith(s.split("=")[0] + ".")]
    where = f"setting {overridden[-1]}" if overridden else f"line {reader.line(choice.place)}"
    return f"{where}, {choice.level.called}" + (f": {how}" if how else "")
