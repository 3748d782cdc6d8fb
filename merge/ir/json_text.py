"""JSON from files that others wrote: nothing is taken on trust, and an error says where and what.

A header of weights is held to the letter of the standard. Configs are read as Python writes them,
which has words for what is infinite: some models' time steps are.
"""

from __future__ import annotations

import json

from merge.errors import SourceError

__all__ = ["check_pairs", "not_an_object", "not_sound", "strict_json"]

_DEEPEST = 200
"""Levels of nesting. Configs have ten; what goes over them is recursive, and the stack ends."""


class _Duplicate(ValueError):
    """A key that occurs twice in one JSON object."""


def strict_json(text: bytes | str, *, infinite: bool = False) -> object:
    """The value in ``text``; ValueError for duplicate keys, over-deep nesting, and what is no text.

    infinite: whether NaN, Infinity and -Infinity are numbers, as Python writes them.
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        out = dict(items)
        if len(out) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    raise _Duplicate(f"the key {key[:100]!r} occurs twice")
                seen.add(key)
        return out

    def constant(word: str) -> object:
        if infinite:
            return float(word)
        raise ValueError(f"{word} is not a JSON number")

    try:
        if isinstance(text, bytes):
            text = text.decode()
        parsed: object = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    _check_depth(parsed)
    check_pairs(text, parsed)
    return parsed


def check_pairs(text: str, parsed: object) -> None:
    """ValueError where an escape in ``text`` is half a surrogate pair, which is no text at all."""
    if "\\u" in text:
        try:
            json.dumps(parsed, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair stands for no character") from None


def not_sound(error: ValueError, **where: object) -> SourceError:
    """The error for a file beside the weights that is no JSON."""
    return SourceError(
        f"not sound JSON: {error}",
        do="mend the file, or fetch it again: it may be cut off",
        **where,
    )


def not_an_object(parsed: object, **where: object) -> SourceError:
    """The error for a file that should hold a mapping."""
    return SourceError(
        "not a JSON object",
        found=type(parsed).__name__,
        expected="a mapping of keys to values",
        do="mend the file, or fetch it again",
        **where,
    )


def _check_depth(parsed: object) -> None:
    level = [parsed]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _inner(value: object) -> list[object]:
    """The lists and mappings right inside a value."""
    values: list[object] = []
    if isinstance(value, dict):
        values = [*value.values()]
    elif isinstance(value, list):
        values = value
    return [v for v in values if isinstance(v, dict | list)]
