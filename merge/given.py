"""Several things of one kind as callers give them: a list, or a mapping by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from merge.errors import RecipeError, hint
from merge.ir.checkpoint import Checkpoint

__all__ = ["by_names", "several"]


def several(given: object, what: str = "models") -> tuple[list[object], list[str] | None]:
    """The things in order, and their names where they have some.

    RecipeError for one thing in the place of several, such as a state dict or a path.
    """
    one = isinstance(given, str | Path | Checkpoint) or not isinstance(given, Iterable)
    found = type(given).__name__
    if isinstance(given, dict) and any(hasattr(v, "element_size") for v in given.values()):
        one, found = True, "a state dict"
    if one:
        raise RecipeError(
            f"{what} are not a list or a mapping",
            found=found,
            expected="[a, b, ...], or {name: a, ...}",
        )
    if isinstance(given, Mapping):
        return list(given.values()), [str(n) for n in given]
    return list(given), None  # type: ignore[call-overload]


def by_names(given: object, names: Sequence[str] | None, what: str) -> object:
    """The values of a mapping in the order of ``names``; anything else as it is.

    RecipeError unless the mapping has just those names.
    """
    if not isinstance(given, Mapping) or names is None:
        return given
    values = {str(n): v for n, v in given.items()}
    strange = next((n for n in values if n not in names), None)
    missing = [n for n in names if n not in values]
    if strange is not None or missing:
        raise RecipeError(
            f"{what} have other names than the models",
            found=strange if strange is not None else f"none for {missing[0]}",
            expected=", ".join(names),
            do=None if strange is None else hint(strange, names),
        )
    return [values[n] for n in names]
