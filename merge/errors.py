"""The exception family: every error that reaches a user is one of these.

MergeError
├── RecipeError      a recipe, a parameter or a command line is wrong      exit 2
├── OutputRefused    the output folder may not be used                     exit 2
├── PlanError        the inputs do not fit together, or not in the budget  exit 3
├── SourceError      an input cannot be read or must not be trusted        exit 3
├── HubError         the Hub, or the way to it, failed us                  exit 4
│   └── DamagedInput  what came is not what was sent; nothing of the run stays
├── SinkError        the disk failed us: space, permission, I/O            exit 4
└── ScoreError       a score failed, or is no number                       exit 4

A message has four parts: what is wrong, where, what was found against what was expected, what to
do. Each part is an attribute too, so tests and ``--json`` need no parsing.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

__all__ = [
    "DamagedInput",
    "HubError",
    "MergeError",
    "OutputRefused",
    "PlanError",
    "RecipeError",
    "ScoreError",
    "SinkError",
    "SourceError",
    "check_word",
    "hint",
    "nearest",
    "told",
]


_SHOWN = 8  # known words in a message


class MergeError(Exception):
    """Base of the family. ``where`` maps a kind of place (file, tensor, key, ...) to its name."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        do: str | None = None,
        **where: object,
    ) -> None:
        self.what = what
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.do = do
        self.where = {k: str(v) for k, v in where.items() if v is not None}
        super().__init__(what)

    def at(self, **where: object) -> MergeError:
        """The same error with places added; a place that is already known is kept."""
        for key, value in where.items():
            if value is not None:
                self.where.setdefault(key, str(value))
        return self

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append("  " + ", ".join(f"{k}: {v}" for k, v in self.where.items()))
        if self.found is not None:
            lines.append(f"  found: {self.found}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.do:
            lines.append(f"  what to do: {self.do}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """The four parts as plain data, for ``--json``."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "do": self.do,
            "exit_code": self.exit_code,
        }


class RecipeError(MergeError):
    """A recipe, a method's parameter or a command line argument is wrong."""

    exit_code = 2


class OutputRefused(MergeError):
    """The output folder is in use, not empty, or overlaps an input."""

    exit_code = 2


class PlanError(MergeError):
    """The inputs do not fit together, or the work does not fit the budget."""

    exit_code = 3


class SourceError(MergeError):
    """An input is missing, damaged, changed under us, or of a kind that is not read."""

    exit_code = 3


class HubError(MergeError):
    """The Hub cannot be reached or served, or sent what it was not asked for."""

    exit_code = 4


class DamagedInput(HubError):
    """What was read and used was not what the input holds: work that rests on it must go."""


class SinkError(MergeError):
    """Writing failed: no space, no permission, or an I/O error."""

    exit_code = 4


class ScoreError(MergeError):
    """What was to score a candidate failed, or gave no number."""

    exit_code = 4


def told(error: BaseException) -> str:
    """What an error of other code says, in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to ``word``: one slip of the keyboard away, else similar, else None.

    >>> nearest("weigth", ["weight", "density"]), nearest("floa16", ["float64", "float16"])
    ('weight', 'float16')
    """
    words = list(known)
    slips = [k for k in words if _one_slip(word, k)]
    found = slips or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return found[0] if found else None


def hint(word: object, known: Iterable[str], otherwise: str | None = None) -> str | None:
    """What to do about a word that is not known: the nearest one that is, or else ``otherwise``.

    >>> hint("weigth", ["weight", "density"])
    "did you mean 'weight'?"
    """
    near = nearest(str(word), known)
    return f"did you mean {near!r}?" if near else otherwise


def check_word(word: str, known: Collection[str], key: str, what: str) -> None:
    """RecipeError, which says ``what`` is wrong, unless the value of ``key`` is a known word."""
    if word not in known:
        more = ", ..." if len(known) > _SHOWN else ""
        raise RecipeError(
            what,
            key=key,
            found=word,
            expected=f"one of {', '.join(list(known)[:_SHOWN])}{more}",
            do=hint(word, known),
        )


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter deleted, inserted, replaced or swapped with the next makes b of a."""
    head = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(map(len, (a, b)))
    )
    x, y = a[head:], b[head:]
    swapped = len(x) > 1 and x[1] + x[0] + x[2:] == y
    return a != b and (x[1:] == y or x == y[1:] or x[1:] == y[1:] or swapped)
