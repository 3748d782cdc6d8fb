"""Patterns of tensor names and of group names: layer numbers in braces, optional parts in brackets.

``[model.]layers.{i}.mlp.up_proj.weight`` matches with and without the prefix, for every layer.

``{i}``       a number, the same wherever it stands; ``{i+1}`` only in names of groups
``{j>0}``     a number greater than 0
``{e{i}}``    the tensor's number in group ``e{i}``: the tensors that differ in it alone are the
              slices of one stacked tensor, and a permutation of the group exchanges their names
``[...]``     may be missing

A pattern is anchored at both ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from merge.errors import RecipeError

__all__ = ["LETTERS", "Finder", "Match", "Pattern", "fill", "numbers_in", "slots"]

LETTERS = "ijklmnop"
"""The letters that stand for numbers, from the left to the right of a name."""

_BRACE = re.compile(r"\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER = re.compile(r"([a-z])(?:>(\d+))?")
_SHIFTED = re.compile(r"\{([a-z])(?:([+-]\d+))?\}")
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Match:
    """What a pattern found in a name: its numbers, and the tensor's number in a stacked group."""

    numbers: Mapping[str, int]
    stack: str = ""  # the group, with its own numbers filled in
    member: int = 0


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern as written and what it means."""

    text: str
    exact: re.Pattern[str]
    loose: re.Pattern[str]  # of names whose numbers were replaced by '#'
    least: Mapping[str, int]
    stack: str = ""

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Read a pattern; `RecipeError` for braces or brackets that mean nothing.

        >>> Pattern.of("[model.]layers.{i}.w").match("layers.12.w").numbers
        {'i': 12}
        """
        exact, loose, least, stack, at = "", "", {}, "", 0
        for found in _BRACE.finditer(text):
            literal = text[at : found.start()]
            exact, loose, at = exact + _literal(literal), loose + _loose(literal), found.end()
            inside, number = found[1], _NUMBER.fullmatch(found[1])
            loose += "#"
            if number is None:
                if stack or ("{" not in inside and not inside.isidentifier()):
                    raise _wrong(text, f"{{{inside}}}")
                stack = inside
                exact += r"(?P<member__>\d+)"
            elif number[1] in least:
                exact += f"(?P={number[1]})"
            else:
                least[number[1]] = int(number[2]) + 1 if number[2] else 0
                exact += rf"(?P<{number[1]}>\d+)"
        exact, loose = exact + _literal(text[at:]), loose + _loose(text[at:])
        try:
            return cls(text, re.compile(exact), re.compile(loose), least, stack)
        except re.error:
            raise _wrong(text, "brackets that do not close") from None

    def match(self, name: str) -> Match | None:
        """The numbers in ``name``; None where the pattern does not match all of it."""
        found = self.exact.fullmatch(name)
        if found is None:
            return None
        numbers = {n: int(found[n]) for n in self.least}
        if any(numbers[n] < least for n, least in self.least.items()):
            return None
        if not self.stack:
            return Match(numbers)
        return Match(numbers, fill(self.stack, numbers), int(found["member__"]))


def fill(name: str, numbers: Mapping[str, int]) -> str:
    """A name of a group with its numbers put in.

    >>> fill("d{i+1}", {"i": 3})
    'd4'
    """

    def number(found: re.Match[str]) -> str:
        if found[1] not in numbers:
            raise RecipeError(
                f"group '{name}' has a number that the tensor's pattern does not have",
                found=f"{{{found[1]}}}",
                expected=", ".join(f"{{{n}}}" for n in numbers) or "no number",
            )
        return str(numbers[found[1]] + int(found[2] or 0))

    return _SHIFTED.sub(number, name)


def slots(pattern: str, name: str) -> dict[str, str] | None:
    """What stands for each letter of a group's pattern in a name: digits, or a letter in braces.

    None where the name is not of the pattern.

    >>> slots("f{i}_{j}", "f0_{j}"), slots("f{i}", "g0")
    ({'i': '0', 'j': '{j}'}, None)
    """
    regex, at = "", 0
    for found in _SHIFTED.finditer(pattern):
        regex += re.escape(pattern[at : found.start()])
        regex += rf"(?P<{found[1]}>\d+|\{{[a-z](?:[+-]\d+)?\}})"
        at = found.end()
    match = re.fullmatch(regex + re.escape(pattern[at:]), name)
    return None if match is None else match.groupdict()


def numbers_in(name: str) -> list[str]:
    """The letters of the numbers in a group's name, each once.

    >>> numbers_in("f{i}_{j}")
    ['i', 'j']
    """
    return list(dict.fromkeys(m[1] for m in _SHIFTED.finditer(name)))


class Finder:
    """Finds which patterns match a name, fast for many names that differ in numbers only."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self.patterns = list(patterns)
        self.seen: dict[str, list[Pattern]] = {}

    def __call__(self, name: str) -> list[tuple[Pattern, Match]]:
        """All patterns that match ``name``, in order, with what they found."""
        kind = _DIGITS.sub("#", name)
        if kind not in self.seen:
            self.seen[kind] = [p for p in self.patterns if p.loose.fullmatch(kind)]
        matches = ((p, p.match(name)) for p in self.seen[kind])
        return [(p, m) for p, m in matches if m is not None]


def _literal(text: str) -> str:
    return re.escape(text).replace(r"\[", "(?:").replace(r"\]", ")?")


def _loose(text: str) -> str:
    return _literal(_DIGITS.sub("#", text))


def _wrong(text: str, found: str) -> RecipeError:
    return RecipeError(
        f"the pattern '{text}' cannot be read",
        found=found,
        expected="{i}, {j>0}, the name of a group in braces, or [an optional part]",
    )
