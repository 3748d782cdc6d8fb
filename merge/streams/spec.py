"""Where a task's examples lie and how they are read, as data: a line of text, or a mapping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from merge.errors import RecipeError, hint

__all__ = ["KINDS", "PARTS", "DataSpec", "parse_data"]

PARTS = ("adapt", "train", "validate", "test")
"""Examples without their labels, to learn from, to choose by, and to judge by."""

KINDS = "a .npz, .jsonl, .csv, .parquet or .txt, a folder of pictures by class, or module:function"

_SHARES = {"train": 0.7, "validate": 0.15, "test": 0.15}


@dataclass(frozen=True, slots=True)
class DataSpec:
    """One task's data.

    path: a .npz, .jsonl, .csv, .parquet or .txt, a folder of pictures by class, or
    ``module:function``. adapt, train, validate, test: files of their own for these parts. text:
    the field with the text; two, divided by a comma, are a pair. label: the field with the label;
    without it texts are for a language model. labels: names of classes in the order of their
    numbers. split: the field that says which part an example is in, or the share of each part, by
    which the hash of an example decides. limit: most examples of a part. batch: examples at a time.
    tokens: most tokens of a text. seed: of shuffling. model: ``module:function`` for the module
    that runs the examples, in the place of the transformers class that config.json names. head:
    ``prototypes``: the mean of each class's training examples, for encoders without a classifier.
    """

    path: str
    text: str = "text"
    label: str | None = None
    positive: str | None = None
    labels: tuple[str, ...] = ()
    split: str | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: dict(_SHARES))
    adapt: str | None = None
    train: str | None = None
    validate: str | None = None
    test: str | None = None
    limit: int | None = None
    batch: int = 32
    tokens: int = 128
    seed: int = 0
    model: str | None = None
    head: str | None = None
    name: str = ""

    @property
    def called(self) -> str:
        """The task's name: its own, else that of its file."""
        return self.name or Path(self.path).stem


def parse_data(given: str | Mapping[str, Any] | DataSpec, name: str = "") -> DataSpec:
    """The spec that a text or a mapping stands for; RecipeError for what it may not hold.

    A text is a path, with options after a question mark.

    >>> spec = parse_data("reviews.csv?text=body&label=stars&split=train:0.8,test:0.2")
    >>> spec.path, spec.text, spec.label, spec.shares
    ('reviews.csv', 'body', 'stars', {'train': 0.8, 'test': 0.2})
    """
    if isinstance(given, DataSpec):
        return given
    values = _of_text(given) if isinstance(given, str) else dict(given)
    if isinstance(values.get("path"), str):
        values = {**_of_text(values["path"]), **{k: v for k, v in values.items() if k != "path"}}
    made: dict[str, Any] = {}
    known = {f.name for f in fields(DataSpec)} - {"shares"}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(
                f"unknown option {key!r} of data",
                key=key,
                data=values.get("path"),
                expected=f"one of {', '.join(sorted(known))}",
                do=hint(key, known),
            )
        if value is not None:
            read: Callable[[str, Any], dict[str, Any]] = _READ.get(key, _text)
            made.update(read(key, value))
    if "path" not in made:
        raise RecipeError("data has no path", key="path", expected=KINDS)
    return DataSpec(**{"name": name, **made})


def _of_text(text: str) -> dict[str, Any]:
    path, mark, options = text.partition("?")
    if not mark or Path(text).exists():
        return {"path": text}
    return {"path": path, **dict(parse_qsl(options, keep_blank_values=True))}


def _wrong(key: str, value: object, expected: str) -> RecipeError:
    return RecipeError(
        f"the value of {key!r} is wrong", key=key, found=repr(value), expected=expected
    )


def _text(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, str) or not value:
        raise _wrong(key, value, "text")
    return {key: value}


def _number(least: int) -> Callable[[str, object], dict[str, Any]]:
    def read(key: str, value: object) -> dict[str, Any]:
        try:
            number = int(str(value))
        except ValueError:
            number = least - 1
        if isinstance(value, bool) or number < least:
            raise _wrong(key, value, f"a whole number of {least} or more")
        return {key: number}

    return read


def _names(key: str, value: object) -> dict[str, Any]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or len(set(map(str, names))) < len(names):
        raise _wrong(key, value, "different names of classes")
    return {key: tuple(str(n) for n in names)}


def _head(key: str, value: object) -> dict[str, Any]:
    if value != "prototypes":
        raise _wrong(key, value, "prototypes")
    return {key: value}


def _split(key: str, value: object) -> dict[str, Any]:
    """A field's name, or shares: ``{train: 0.8, test: 0.2}``, as text ``train:0.8,test:0.2``."""
    if isinstance(value, str) and ":" not in value:
        return _text(key, value)
    pairs = value.items() if isinstance(value, Mapping) else _pairs(str(value))
    shares: dict[str, float] = {}
    for part, share in pairs:
        if part not in PARTS:
            raise _wrong(key, part, f"one of {', '.join(PARTS)}")
        try:
            shares[part] = float(share)
        except (TypeError, ValueError):
            shares[part] = math.nan
        if not shares[part] >= 0:
            raise _wrong(key, value, "shares of 0 or more")
    total = math.fsum(shares.values())
    if not 0 < total <= 1 + 1e-9:
        raise _wrong(key, value, "shares that add up to 1 or less")
    return {"shares": shares}


def _pairs(text: str) -> list[tuple[str, str]]:
    parts = (part.partition(":") for part in text.split(","))
    return [(name.strip(), share) for name, _, share in parts]


_READ: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "labels": _names,
    "split": _split,
    "limit": _number(1),
    "batch": _number(1),
    "tokens": _number(2),
    "seed": _number(0),
    "head": _head,
}
