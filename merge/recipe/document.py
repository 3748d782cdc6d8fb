"""YAML text to plain data, with the line and column of every key and item.

YAML 1.2 through ruamel.yaml: ``1e-4`` is a number, ``on`` and ``yes`` are text (which boolean
parameters understand). Duplicate keys are refused, or the last one counts where that is asked for.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import RecipeError, hint
from merge.recipe.parser import load

__all__ = ["Document", "Place", "read_documents", "read_text", "unknown_key"]

Place = tuple[str | int, ...]
"""Where in a document: keys and list indices from the top."""

_MAX_TEXT = 1_000_000  # characters
_MAX_NODES = 20_000  # aliases count each time they are used
_MAX_LINES = 20_000
_MAX_BRACKETS = 2_000  # the parser's work grows with the square of how deep they nest


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: plain dicts, lists and scalars, and 1-based (line, column) by place."""

    name: str
    data: Any
    positions: dict[Place, tuple[int, int]]
    repeated: tuple[tuple[str, int], ...] = ()  # keys given twice, with the line of the later

    def where(self, place: Sequence[str | int]) -> dict[str, Any]:
        """The place as error fields: recipe, line, column; the nearest known place above it."""
        at = tuple(place)
        while at and at not in self.positions:
            at = at[:-1]
        line, column = self.positions.get(at, (1, 1))
        return {"recipe": self.name, "line": line, "column": column}

    def error(self, what: str, place: Sequence[str | int], **parts: Any) -> RecipeError:
        """A RecipeError at a place of this document."""
        return RecipeError(what, **parts, **self.where(place))


def unknown_key(
    document: Document, place: Sequence[str | int], known: Sequence[str], where: str = ""
) -> RecipeError:
    """The error for a key that may not stand at ``place``, with the nearest that may."""
    key = str(place[-1])
    return document.error(
        f"unknown key {key!r}{where}",
        place,
        key=key,
        expected=f"one of {', '.join(known)}",
        do=hint(key, known),
    )


def read_documents(text: str, name: str, *, last_wins: bool = False) -> list[Document]:
    """The YAML documents of a text; positions are those in the whole of it.

    last_wins: of a duplicate key the last value counts. RecipeError with line and column for
    anything that is not YAML.
    """
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > _MAX_TEXT:
        raise RecipeError("a recipe of more than a million characters", recipe=name)
    if text.count("\n") > _MAX_LINES or text.count("[") + text.count("{") > _MAX_BRACKETS:
        raise RecipeError("the recipe has far too many lines or brackets", recipe=name)
    try:
        trees = load(text, last_wins=last_wins)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (1, 1) if mark is None else (mark.line + 1, mark.column + 1)
        escape = "escape character" in str(error.problem)
        raise RecipeError(
            _problem(error),
            recipe=name,
            line=line,
            column=column,
            do="write a path with backslashes in single quotes" if escape else None,
        ) from None
    except (YAMLError, RecursionError, ValueError) as error:
        first = str(error).partition("\n")[0]
        line, column = _line_column(text[: getattr(error, "position", 0)])
        raise RecipeError(
            f"not readable as YAML: {first}", recipe=name, line=line, column=column
        ) from None
    documents = []
    budget = [_MAX_NODES]
    for tree, twice in trees:
        positions: dict[Place, tuple[int, int]] = {}
        try:
            data = _plain(tree, (), positions, budget)
        except (_TooMuch, RecursionError):
            raise RecipeError("the recipe expands to far too many values", recipe=name) from None
        if data is not None:  # a line of dashes at the end begins a document of nothing
            documents.append(Document(name, data, positions, tuple(twice)))
    return documents


def _line_column(before: str) -> tuple[int, int]:
    """Where the text after ``before`` begins, counted from 1."""
    return before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1


def _problem(error: Any) -> str:
    if type(error).__name__ == "DuplicateKeyError":
        return str(error.problem).partition(" with ")[0].replace("found ", "")
    return f"not readable as YAML: {error.problem or error.context}"


class _TooMuch(Exception):
    pass


def _plain(
    node: Any, place: Place, positions: dict[Place, tuple[int, int]], budget: list[int]
) -> Any:
    """``node`` without ruamel's types; notes the position of keys and items."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq
    from ruamel.yaml.scalarfloat import ScalarFloat
    from ruamel.yaml.scalarint import ScalarInt
    from ruamel.yaml.scalarstring import ScalarString

    budget[0] -= 1
    if budget[0] < 0:
        raise _TooMuch
    if isinstance(node, CommentedMap):
        out = {}
        for key, value in node.items():
            word = str(key)
            at = (*place, word)
            if key in (node.lc.data or {}):
                line, column = node.lc.key(key)
                positions[at] = (line + 1, column + 1)
            out[word] = _plain(value, at, positions, budget)
        return out
    if isinstance(node, CommentedSeq):
        items = []
        for i, value in enumerate(node):
            at = (*place, i)
            if i in (node.lc.data or {}):
                line, column = node.lc.item(i)
                positions[at] = (line + 1, column + 1)
            items.append(_plain(value, at, positions, budget))
        return items
    if isinstance(node, ScalarFloat):
        return float(node)
    if isinstance(node, ScalarInt):
        return int(node)
    if isinstance(node, ScalarString):
        return str(node)
    return node


def read_text(path: Path) -> str:
    """The text of a recipe file; RecipeError when it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(4 * _MAX_TEXT + 1)
        if len(data) > 4 * _MAX_TEXT:  # more bytes than so many characters can have
            raise RecipeError("a recipe of more than a million characters", recipe=path)
        data = data.removeprefix(codecs.BOM_UTF8)
        return data.decode()
    except FileNotFoundError:
        raise RecipeError("no such recipe", recipe=path) from None
    except UnicodeDecodeError as error:
        line, column = _line_column(data[: error.start].decode())
        raise RecipeError(
            f"the recipe is not UTF-8 at byte {error.start}",
            recipe=path,
            line=line,
            column=column,
            do="save it as UTF-8",
        ) from None
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror}", recipe=path) from None
