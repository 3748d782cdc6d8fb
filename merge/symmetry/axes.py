"""The axes of a tensor in terms of groups: sums of products of factors, as text and as data.

``kv3.slot3._`` is row-major: the axis is counted by key/value head, then by query slot in it, then
by something fixed. ``q+k+v`` is three parts one after the other. Grammar::

    axis    = product ("+" product)*
    product = factor ("." factor)*
    factor  = NAME | NAME"*" | "|"NAME"|" | "_"[SIZE][WORD] | "(" axis ")"

``x*`` is contravariant: where a matrix M moves x, the transpose of its inverse moves ``x*``.
``|x|`` follows permutations of x but not its signs and scales. ``_`` is fixed, of size SIZE where
it is given, for the reason that WORD stands for. A name may hold layer numbers in braces.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from merge.errors import RecipeError

__all__ = ["Axis", "Factor", "Form", "factors_of", "named", "parse_axis"]

Form = Literal["", "*", "|"]

_TOKEN = re.compile(
    r"(?P<name>[A-Za-z](?:\w|\{[^{}]*\})*)|(?P<fixed>_(?P<size>\d*)(?P<word>(?:[A-Za-z]\w*)?))"
    r"|(?P<sign>[+.()|*])"
)


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of an axis: a group in one of its forms, or something fixed (``group`` is None).

    ``size`` is 0 where it is not known yet; ``reason`` is the word for why it is fixed.
    """

    group: str | None
    size: int = 0
    form: Form = ""
    reason: str = ""

    def __str__(self) -> str:
        if self.group is None:
            return f"_{self.size or ''}{self.reason}"
        return f"|{self.group}|" if self.form == "|" else f"{self.group}{self.form}"


@dataclass(frozen=True, slots=True)
class Axis:
    """A sum of products: parts one after the other, each a row-major product of factors or sums."""

    parts: tuple[tuple[Factor | Axis, ...], ...]

    @property
    def size(self) -> int:
        """Length of the axis; 0 where a factor's size is not known."""
        sizes = [math.prod(f.size for f in product) for product in self.parts]
        return sum(sizes) if all(sizes) else 0

    def map(self, change: Callable[[Factor], Factor]) -> Axis:
        """The same axis with each factor changed."""
        parts = (
            tuple(f.map(change) if isinstance(f, Axis) else change(f) for f in product)
            for product in self.parts
        )
        return Axis(tuple(parts))

    def __str__(self) -> str:
        products = []
        for product in self.parts:
            texts = [f"({f})" if isinstance(f, Axis) else str(f) for f in product]
            products.append(".".join(texts) or "_1")
        return "+".join(products)


def factors_of(axis: Axis) -> Iterator[Factor]:
    """All factors, from the outer to the inner and from the first part to the last.

    >>> [str(f) for f in factors_of(parse_axis("h.(q+k*)"))]
    ['h', 'q', 'k*']
    """
    for product in axis.parts:
        for factor in product:
            if isinstance(factor, Axis):
                yield from factors_of(factor)
            else:
                yield factor


def parse_axis(text: str) -> Axis:
    """The axis that ``text`` describes; `RecipeError` where it is not of the grammar.

    >>> print(parse_axis("kv{i}.slot{i}._3 + |f{i}|"))
    kv{i}.slot{i}._3+|f{i}|
    """
    tokens = _tokens(text)
    axis, end = _sum(text, tokens, 0)
    if end < len(tokens):
        raise _wrong(text, tokens[end])
    return axis


def _tokens(text: str) -> list[re.Match[str]]:
    tokens, at = [], 0
    for match in _TOKEN.finditer(compact := text.replace(" ", "")):
        if match.start() != at:
            break
        tokens.append(match)
        at = match.end()
    if at != len(compact) or not tokens:
        raise _wrong(text, None if at == len(compact) else compact[at])
    return tokens


def _sum(text: str, tokens: list[re.Match[str]], at: int) -> tuple[Axis, int]:
    products: list[tuple[Factor | Axis, ...]] = []
    while True:
        factors: list[Factor | Axis] = []
        while True:
            factor, at = _factor(text, tokens, at)
            factors.append(factor)
            if not _is(tokens, at, "."):
                break
            at += 1
        products.append(tuple(factors))
        if not _is(tokens, at, "+"):
            return Axis(tuple(products)), at
        at += 1


def _factor(text: str, tokens: list[re.Match[str]], at: int) -> tuple[Factor | Axis, int]:
    if at >= len(tokens):
        raise _wrong(text, None)
    token = tokens[at]
    if token["name"]:
        starred = _is(tokens, at + 1, "*")
        return Factor(token["name"], form="*" if starred else ""), at + 1 + starred
    if token["fixed"]:
        return Factor(None, int(token["size"] or 0), reason=token["word"]), at + 1
    if token["sign"] == "|" and at + 1 < len(tokens) and tokens[at + 1]["name"]:
        return Factor(tokens[at + 1]["name"], form="|"), _expect(text, tokens, at + 2, "|")
    if token["sign"] == "(":
        axis, end = _sum(text, tokens, at + 1)
        return axis, _expect(text, tokens, end, ")")
    raise _wrong(text, token)


def _is(tokens: list[re.Match[str]], at: int, sign: str) -> bool:
    return at < len(tokens) and tokens[at]["sign"] == sign


def _expect(text: str, tokens: list[re.Match[str]], at: int, sign: str) -> int:
    if not _is(tokens, at, sign):
        raise _wrong(text, tokens[at] if at < len(tokens) else None, f"'{sign}'")
    return at + 1


def _wrong(
    text: str, found: re.Match[str] | str | None, expected: str = "sums and products of groups"
) -> RecipeError:
    token = found if found is None or isinstance(found, str) else found.group()
    return RecipeError(
        f"'{text}' does not describe an axis",
        found="its end" if token is None else f"'{token}'",
        expected=expected,
        do="write an axis like 'kv{i}.slot{i}._' or 'q+k+v': groups joined by . and +",
    )


def named(axis: Axis, name: Callable[[str], str]) -> Axis:
    """The same axis with its groups called otherwise."""
    return axis.map(lambda f: f if f.group is None else replace(f, group=name(f.group)))
