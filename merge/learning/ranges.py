"""Values that a number may take: a stretch, in steps or not, or a list."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge.errors import RecipeError

__all__ = ["Range", "parse_range"]

_EXPECTED = "first:last, first:last:step, or values divided by commas"


@dataclass(frozen=True, slots=True)
class Range:
    """From ``low`` to ``high``, both included, in steps of ``step``; or one of ``values``.

    log: spread evenly by ratio. A place in it is a number from 0 to 1.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    values: tuple[float, ...] = ()

    @property
    def count(self) -> int | None:
        """How many values there are; None for a stretch without steps."""
        if self.values:
            return len(self.values)
        if self.step is None:
            return None
        return int((self.high - self.low) / self.step + 1e-9) + 1

    def grid(self, count: int = 11) -> tuple[float, ...]:
        """All values; of a stretch without steps ``count`` at equal distances."""
        if self.values:
            return self.values
        number = self.count or count
        if self.step is not None:
            return tuple(round(self.low + i * self.step, 12) for i in range(number))
        places = [i / (number - 1) if number > 1 else 0.5 for i in range(number)]
        return tuple(self.at(place) for place in places)

    def at(self, place: float) -> float:
        """The value at a place from 0 to 1.

        >>> Range(0, 2, step=0.5).at(0.3), Range(1, 100, log=True).at(0.5)
        (0.5, 10.0)
        """
        place = min(1.0, max(0.0, place))
        if self.count is not None:
            values = self.grid()
            return values[min(int(place * len(values)), len(values) - 1)]
        if self.log:
            a, b = math.log(self.low), math.log(self.high)
            return round(math.exp(a + place * (b - a)), 12)
        return round(self.low + place * (self.high - self.low), 12)

    def place(self, value: float) -> float:
        """Where a value lies, or the end that is nearest to it."""
        if self.count is not None:
            values = self.grid()
            nearest = min(range(len(values)), key=lambda i: abs(values[i] - value))
            return (nearest + 0.5) / len(values)
        if self.log:
            a, b = math.log(self.low), math.log(self.high)
            found = (math.log(value) - a) / (b - a) if value > 0 else 0.0
        else:
            found = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, found))

    def __str__(self) -> str:
        if self.values:
            return ", ".join(f"{v:g}" for v in self.values)
        step = "" if self.step is None else f" in steps of {self.step:g}"
        return f"{self.low:g} to {self.high:g}{step}{' by ratio' if self.log else ''}"


def parse_range(given: str | Sequence[float] | Mapping[str, object]) -> Range:
    """The range in ``0:1:0.25``, ``0:1``, ``0.1,0.3``, a list of values, or a mapping.

    RecipeError for what is none. A mapping has low and high, and step, steps or log; or values.

    >>> parse_range("0:1:0.25").grid()
    (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    try:
        return _range(given)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise RecipeError(
            "this is no range of values", found=repr(given), expected=_EXPECTED
        ) from None


def _range(given: str | Sequence[float] | Mapping[str, object]) -> Range:
    if isinstance(given, str) and ":" in given:
        low, high, *step = (float(part) for part in given.split(":"))
        if len(step) > 1:
            raise ValueError
        return _checked(Range(low, high, step[0] if step else None))
    if isinstance(given, str):
        return _listed([float(part) for part in given.split(",")])
    if not isinstance(given, Mapping):
        return _listed([_number(v) for v in given])
    if given.get("values") is not None:
        return _listed([_number(v) for v in given["values"]])  # type: ignore[attr-defined]
    low, high = _number(given["low"]), _number(given["high"])
    step_, steps = given.get("step"), given.get("steps")
    log = bool(given.get("log"))
    if steps is not None:
        grid = _checked(Range(low, high, log=log)).grid(int(_number(steps)))
        return _listed(list(grid))
    return _checked(Range(low, high, None if step_ is None else _number(step_), log))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return float(value)


def _listed(values: list[float]) -> Range:
    if not values or not all(map(math.isfinite, values)):
        raise ValueError
    return Range(min(values), max(values), values=tuple(values))


def _checked(found: Range) -> Range:
    finite = math.isfinite(found.low) and math.isfinite(found.high)
    if not finite or found.low >= found.high or (found.log and found.low <= 0):
        raise ValueError
    if found.step is not None and not 0 < found.step <= found.high - found.low + 1e-12:
        raise ValueError
    return found
