"""Parameters by level: where a value may stand in a recipe, and which one counts for a tensor.

Highest first: the model's own, the slice's, the module's, the recipe's, the method's default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from merge import methods
from merge.errors import RecipeError, hint
from merge.methods.core.schema import Method, ParameterSpec
from merge.recipe.document import Document, Place
from merge.recipe.read import Stage
from merge.recipe.values import Value, parse_value

__all__ = ["Choice", "Level", "Reader"]

_DEAD = {"embed_slerp": "it has had no effect in mergekit since 2024"}
"""Parameters of old recipes that no method has any more."""


@dataclass(frozen=True, slots=True)
class Level:
    """The parameters that stand at one place of a recipe."""

    called: str
    values: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """The value of one parameter for one tensor, and where it stands: nowhere for a default."""

    value: Any
    level: Level | None = None
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the levels of one stage, noting what is ignored."""

    stage: Stage
    method: Method
    notes: list[str]
    known: dict[Place, Level] = field(default_factory=dict)

    @property
    def document(self) -> Document:
        return self.stage.document

    def line(self, place: Place) -> int:
        return int(self.document.where(place)["line"])

    def level(
        self, called: str, place: Place, raw: Mapping[str, object], *, own: bool = False
    ) -> Level:
        """The parameters at ``place``, checked against the method. ``own``: those of a model."""
        if place in self.known:
            return self.known[place]
        out: dict[str, Value] = {}
        ignored = self._ignore if self.stage.lenient else None
        for key, value in raw.items():
            at = (*place, "parameters", key)
            spec = self.method.parameters.get(key)
            if spec is None:
                self._foreign(key, at)
            elif own and not spec.per_model:
                self.notes.append(
                    f"line {self.line(at)}: {key!r} is ignored under a model: it is one value for"
                    " the whole merge, written under the recipe's own parameters"
                )
            elif (parsed := parse_value(value, at, self.document, ignored)) is not None:
                out[key] = parsed.convert(partial(self._coerce, spec))
        return self.known.setdefault(place, Level(called, out))

    def _foreign(self, key: str, at: Place) -> None:
        """Note a parameter of another method; refuse one that no method has."""
        method, registry = self.method, methods.registry().values()
        others = [m.name for m in registry if key in m.parameters]
        if others:
            self.notes.append(
                f"line {self.line(at)}: {key!r} is ignored: {method.name} has no such parameter"
                f" ({', '.join(others[:3])} has)"
            )
        elif key in _DEAD:
            self.notes.append(f"line {self.line(at)}: {key!r} is ignored: {_DEAD[key]}")
        elif self.stage.lenient:
            self._ignore(at)
        else:
            everything = sorted({k for m in registry for k in m.parameters})
            raise self.document.error(
                f"unknown parameter {key!r}",
                at,
                key=key,
                expected=f"one of {', '.join(method.parameters) or '(none)'}",
                do=hint(
                    key, [*method.parameters, *everything], f"see `merge methods {method.name}`"
                ),
            )

    def _ignore(self, place: Place) -> None:
        self.notes.append(f"line {self.line(place)}: {place[-1]!r} is not known and is ignored")

    def _coerce(self, spec: ParameterSpec, scalar: object, place: Place) -> Any:
        if scalar is None:
            return None
        try:
            return spec.coerce(scalar)
        except RecipeError as error:
            raise error.at(**self.document.where(place)) from None

    def unmatched(self, level: Level, names: Sequence[str]) -> None:
        """Note the filters of a level that no tensor's name holds."""
        for value in level.values.values():
            for text, place in value.unmatched(names):
                note = f"line {self.line(place)}: no tensor's name holds the filter {text!r}"
                if note not in self.notes:
                    self.notes.append(note)

    def choose(
        self, spec: ParameterSpec, levels: Sequence[Level], name: str, depth: float
    ) -> Choice:
        """The value that counts for the tensor ``name`` at ``depth``."""
        for level in levels:
            if (value := level.values.get(spec.key)) is None:
                continue
            found = value.at(name, depth)
            if found is not None and found[0] is not None:
                return Choice(self._coerce(spec, *found), level, found[1])
        if spec.required:
            raise RecipeError(
                f"method {self.method.name!r} needs parameter {spec.key!r}"
                + (" for every model" if spec.per_model else ""),
                key=spec.key,
                tensor=name,
                expected=f"a value in {spec.range}",
                do="write it under the recipe's parameters" + (" or each model" * spec.per_model),
            )
        return Choice(spec.default)
