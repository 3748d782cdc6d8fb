"""Parameter values: a scalar, a gradient over depth, or a list of filters.

A gradient ``[0, 0.5, 1]`` is read at a tensor's depth t in [0, 1] by linear interpolation. A filter
entry applies to tensors whose name contains its text; the first that matches wins, and an entry
without a filter matches all. These are mergekit's meanings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from merge.recipe.document import Document, Place, unknown_key

__all__ = ["Scalar", "Value", "parse_value"]

Scalar = float | int | bool | str | None
FILTER = ("filter", "value")
Ignored = Callable[[Place], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    filter: str | None
    values: tuple[Scalar, ...]
    place: Place

    def matches(self, name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in name


@dataclass(frozen=True, slots=True)
class Value:
    """One parameter at one level of a recipe. ``place`` is where it stands."""

    entries: tuple[_Entry, ...]
    place: Place

    @property
    def constant(self) -> Scalar:
        """The one scalar that it is for every tensor at any depth; None where it varies."""
        first = self.entries[0]
        whole = first.filter in (None, "*") and len(first.values) == 1
        return first.values[0] if whole else None

    def at(self, name: str, depth: float) -> tuple[Scalar, Place] | None:
        """The scalar for the tensor ``name`` at ``depth``, and where it stands; or None."""
        for entry in self.entries:
            if entry.matches(name):
                return interpolate(entry.values, depth), entry.place
        return None

    def how(self, name: str, depth: float) -> str:
        """Which filter let the tensor ``name`` in, and where in a gradient it stands, in words."""
        for entry in self.entries:
            if entry.matches(name):
                words = [] if entry.filter is None else [f"filter {entry.filter!r}"]
                if len(entry.values) > 1:
                    words.append(f"gradient {list(entry.values)} at depth {depth:.4g}")
                return ", ".join(words)
        return ""

    def convert(self, change: Callable[[Scalar, Place], Scalar]) -> Value:
        """The same value with every scalar changed; ``change`` also gets where it stands."""
        return replace(
            self,
            entries=tuple(
                replace(e, values=tuple(change(v, e.place) for v in e.values)) for e in self.entries
            ),
        )

    def unmatched(self, names: Iterable[str]) -> list[tuple[str, Place]]:
        """The filters that no tensor name holds, and where they stand."""
        every = list(names)
        return [
            (e.filter, e.place)
            for e in self.entries
            if e.filter not in (None, "*") and not any(e.filter in n for n in every)
        ]


def interpolate(values: tuple[Scalar, ...], depth: float) -> Scalar:
    """The gradient ``values`` at ``depth``; values that are not numbers are stepped through.

    >>> interpolate((0.0, 1.0, 0.0), 0.25)
    0.5
    """
    if len(values) == 1:
        return values[0]
    scaled = depth * (len(values) - 1)
    low = math.floor(scaled)
    high = min(len(values) - 1, low + 1)
    a, b = values[low], values[high]
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return a
    if isinstance(a, bool) or isinstance(b, bool):
        return a
    fraction = scaled - low
    return (1.0 - fraction) * a + fraction * b


def parse_value(
    raw: object, place: Place, document: Document, ignored: Ignored | None = None
) -> Value | None:
    """The value that stands at ``place``; None for an empty list, which says nothing.

    ignored: is told of unknown keys in filters, which are an error without it.
    """
    if isinstance(raw, dict):
        return Value((_filtered(raw, place, document, ignored),), place)
    if not isinstance(raw, list):
        return Value((_Entry(None, (_scalar(raw, place, document),), place),), place)
    if not raw:
        return None
    if any(isinstance(v, dict) for v in raw):
        entries = [
            _filtered(v, (*place, i), document, ignored)
            if isinstance(v, dict)
            else _Entry(None, (_scalar(v, (*place, i), document),), (*place, i))
            for i, v in enumerate(raw)
        ]
        return Value(tuple(entries), place)
    return Value((_Entry(None, _gradient(raw, place, document), place),), place)


def _filtered(
    raw: dict[str, object], place: Place, document: Document, ignored: Ignored | None
) -> _Entry:
    for key in raw:
        if key in FILTER:
            continue
        if ignored is None:
            raise unknown_key(document, (*place, key), FILTER, " in a filter")
        ignored((*place, key))
    if "value" not in raw:
        raise document.error("a filter entry has no value", place, expected="filter and value")
    text = raw.get("filter")
    if text is not None and not isinstance(text, str):
        raise document.error(
            "a filter is not text", (*place, "filter"), found=repr(text), expected="part of a name"
        )
    inner, at = raw["value"], (*place, "value")
    if isinstance(inner, list):
        return _Entry(text, _gradient(inner, at, document) or (None,), at)
    return _Entry(text, (_scalar(inner, at, document),), at)


def _gradient(raw: list[object], place: Place, document: Document) -> tuple[Scalar, ...]:
    return tuple(_scalar(v, (*place, i), document) for i, v in enumerate(raw))


def _scalar(raw: object, place: Place, document: Document) -> Scalar:
    if raw is None or isinstance(raw, bool | int | float | str):
        return raw
    raise document.error(
        "a parameter value is nested too deeply",
        place,
        found=type(raw).__name__,
        expected="a number, a list of numbers, or a list of {filter, value}",
    )
