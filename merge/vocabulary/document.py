"""A JSON object whose values know where they stand, so that one can be replaced in the text.

A tokenizer.json of 128k tokens takes seconds to write as Python does it, indented; all of it stays
as it was but the list of added tokens.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.ir.json_text import check_pairs, not_sound

__all__ = ["Document", "parse_document", "read_document"]

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Document:
    """The values at the top of a JSON object, each with the span of characters that it takes."""

    text: str
    values: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]]
    end: int  # of the last value, or the opening brace

    def replaced(self, changes: Mapping[str, str]) -> str:
        """The text with other values, given as JSON; those that are not there are put last.

        >>> parse_document('{"a": 1, "b": [2]}').replaced({"a": "7", "c": "{}"})
        '{"a": 7, "b": [2], "c": {}}'
        """
        edits = [(*self.spans[k], v) for k, v in changes.items() if k in self.spans]
        fresh = [f"{json.dumps(k)}: {v}" for k, v in changes.items() if k not in self.spans]
        gap = "\n  " if "\n" in self.text[: self.end] else " "
        first = f",{gap}" if self.values else ""
        edits += [(self.end, self.end, first + f",{gap}".join(fresh))] if fresh else []
        out, at = [], 0
        for begin, end, value in sorted(edits, key=lambda e: e[0]):
            out += [self.text[at:begin], value]
            at = end
        return "".join([*out, self.text[at:]])


def read_document(text: str, file: str, label: str) -> Document:
    """The object that ``text`` is; SourceError names the file, and the model whose it is."""
    try:
        return parse_document(text)
    except ValueError as error:
        raise not_sound(error, file=file, model=label) from None


def parse_document(text: str) -> Document:
    """The object that ``text`` is; ValueError says what is wrong with it."""
    collecting = gc.isenabled()
    gc.disable()  # which else goes over 300 000 new lists of merges again and again
    try:
        document = _parsed(text)
        if _SURROGATE.search(text):
            check_pairs(text, document.values)
        return document
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        if collecting:
            gc.enable()


def _parsed(text: str) -> Document:
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    at = _expect(text, 0, "{")
    end = at
    if text[at : at + 1] == "}":
        return _finished(text, at + 1, Document(text, values, spans, end))
    while True:
        key, at = _DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError(f"a key that is no text before character {at}")
        begin = _expect(text, at, ":")
        values[key], end = _DECODER.raw_decode(text, begin)
        spans[key] = (begin, end)
        at = _skip(text, end)
        if text[at : at + 1] != ",":
            return _finished(text, _expect(text, at, "}"), Document(text, values, spans, end))
        at = _expect(text, at, ",")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "the pattern matches nothing, too"
    return found.end()


def _expect(text: str, at: int, mark: str) -> int:
    """Where the text goes on after ``mark`` and white space."""
    at = _skip(text, at)
    if text[at : at + 1] != mark:
        raise ValueError(f"expected {mark!r} at character {at}")
    return _skip(text, at + 1)


def _finished(text: str, at: int, document: Document) -> Document:
    if _skip(text, at) != len(text):
        raise ValueError(f"more text after the object, at character {at}")
    return document
