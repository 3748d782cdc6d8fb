"""The numbers that ``tune:`` looks for, and where in a recipe each of them goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge.errors import RecipeError
from merge.learning.ranges import Range, parse_range
from merge.learning.search import Values
from merge.recipe.read import Stage
from merge.recipe.tune_words import RangeEntry, TuneEntry

__all__ = ["Knob", "Place", "places_of", "settings_of", "start_of"]

_PARTS = ("parameters", "models", "slices", "modules")


@dataclass(frozen=True, slots=True)
class Knob:
    """One number, its name in tables, and the values it may take."""

    name: str
    range: Range


@dataclass(frozen=True, slots=True)
class Place:
    """A value of the recipe that is made of numbers: one, over depth, or by names of tensors.

    key: as for ``--set``. filters: one row of numbers each, then one for the rest. width: numbers
    in a row. repeat: layers that share a number, 0 where numbers are interpolated between. layers:
    how many there are.
    """

    key: str
    called: str
    range: Range
    start: float | None
    filters: tuple[str, ...] = ()
    width: int = 1
    repeat: int = 0
    layers: int = 0

    @property
    def knobs(self) -> list[Knob]:
        """The numbers, in their order."""
        rows = [*self.filters, "rest"] if self.filters else [""]
        found = []
        for row in rows:
            for i in range(self.width):
                words = [row] if row else []
                words += [self._where(i)] if self.width > 1 else []
                name = self.called + "".join(f"[{w}]" for w in words)
                found.append(Knob(name, self.range))
        return found

    def _where(self, index: int) -> str:
        """The layers, or the depth, that a number is for."""
        if not self.repeat:
            return f"{index / (self.width - 1):.3g}"
        first = index * self.repeat
        last = min(first + self.repeat, self.layers) - 1
        return f"{first}-{last}" if last > first else f"{first}"

    def value(self, numbers: Sequence[float]) -> Any:
        """The recipe's value that these numbers make."""
        rows = [self._row(numbers[i : i + self.width]) for i in range(0, len(numbers), self.width)]
        if not self.filters:
            return rows[0]
        named = [{"filter": f, "value": r} for f, r in zip(self.filters, rows, strict=False)]
        return [*named, {"value": rows[-1]}]

    def _row(self, numbers: Sequence[float]) -> Any:
        if self.repeat:
            return [numbers[i // self.repeat] for i in range(self.layers)]
        return list(numbers) if self.width > 1 else numbers[0]


def places_of(stage: Stage, entry: TuneEntry, layers: Callable[[], int]) -> list[Place]:
    """The places of all keys of ``over``; RecipeError for a key that leads nowhere.

    layers: how many layers the result has.
    """
    found: list[Place] = []
    for key, span in entry.over.items():
        try:
            found += _places(stage, key, span, layers)
        except RecipeError as error:
            where = stage.document.where(("tune", "over", key))
            raise error.at(key=key, **where) from None
    keys = [place.key for place in found]
    if twice := next((k for k in keys if keys.count(k) > 1), None):
        said = "a value is tuned twice"
        raise stage.document.error(said, ("tune", "over"), key="over", found=twice)
    return found


def _places(stage: Stage, key: str, span: RangeEntry, layers: Callable[[], int]) -> Iterator[Place]:
    given = span.model_dump(include={"low", "high", "step", "steps", "values", "log"})
    numbers = parse_range({k: v for k, v in given.items() if v is not None})
    if span.knots is not None and span.every is not None:
        raise RecipeError("both knots and every are given", do="keep one of them")
    count = layers() if span.every is not None else 0
    if span.every is not None and count < 1:
        raise RecipeError("the result has no layers that numbers could be for", found="every")
    width = span.knots or (-(-count // span.every) if span.every else 1)
    for full, called in _spread(stage, key, span.each):
        own = span.start if span.start is not None else _number_at(stage, full)
        yield Place(
            full,
            called,
            numbers,
            own,
            tuple(span.filters or ()),
            width,
            span.every or 0,
            count,
        )


def _spread(stage: Stage, key: str, each: str | None) -> list[tuple[str, str]]:
    """The full keys that a key stands for, and what they are called."""
    name, colon, rest = key.rpartition(":")
    plain = rest.partition(".")[0] not in _PARTS
    if each is None:
        return [(f"{name}{colon}parameters.{rest}" if plain else key, key)]
    if not plain or colon:
        raise RecipeError(
            "one number for each is of a parameter by its name alone",
            found=key,
            expected="such as weight",
        )
    model = stage.model
    if each == "model":
        entries = [(f"models.{i}", str(e.model)) for i, e in enumerate(model.models or ())]
    elif each == "slice":
        entries = [(f"slices.{i}", str(i)) for i, _ in enumerate(model.slices or ())]
    else:
        entries = [
            (f"slices.{i}.sources.{j}", f"{i}][{e.model}")
            for i, s in enumerate(model.slices or ())
            for j, e in enumerate(s.sources)
        ]
    if not entries:
        raise RecipeError(
            f"there is not one {each} in the recipe",
            expected=f"{'models' if each == 'model' else 'slices'}",
        )
    return [(f"{at}.parameters.{key}", f"{key}[{who.rpartition('/')[2]}]") for at, who in entries]


def _number_at(stage: Stage, key: str) -> float | None:
    """The number that stands at a key; the recipe's own where a model has none; None for others."""
    if ":" in key:
        return None
    found: Any = stage.document.data
    for setting in stage.settings:
        if setting.partition("=")[0] == key:
            return _as_number(json_or_none(setting.partition("=")[2]))
    for part in key.split("."):
        if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, Mapping) and part in found:
            found = found[part]
        else:
            last = key.rpartition(".")[2]
            upper = f"parameters.{last}"
            return None if key == upper else _number_at(stage, upper)
    return _as_number(found)


def json_or_none(text: str) -> Any:
    """The value in a JSON text; None for what is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _as_number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known else None


def settings_of(places: Sequence[Place], values: Values) -> tuple[str, ...]:
    """The values as settings of the recipe."""
    found, at = [], 0
    for place in places:
        count = len(place.knobs)
        found.append(f"{place.key}={json.dumps(place.value(values[at : at + count]))}")
        at += count
    return tuple(found)


def start_of(places: Sequence[Place]) -> Values | None:
    """The recipe's own values; None unless it has all of them."""
    if any(place.start is None for place in places):
        return None
    return tuple(
        float(place.start) for place in places for _ in place.knobs if place.start is not None
    )
