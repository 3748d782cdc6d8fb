"""Labels as they are written to the numbers of a model's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge.errors import SourceError, hint
from merge.streams.examples import Example
from merge.streams.spec import DataSpec

__all__ = ["Classes", "classes_of"]

Classes = Mapping[str | int, int]
"""From a label as written to the number of its class."""


def classes_of(
    examples: Sequence[Example], spec: DataSpec, config: Mapping[str, Any] | None
) -> Classes:
    """The number of each label: as ``labels`` lists them, as config.json knows them, or as it is.

    Names that neither knows count in alphabetical order where there are as many as the model has
    classes (or nobody says how many). SourceError for one class, and for labels out of range.
    """
    first: dict[str | int, Example] = {}
    for example in examples:
        if example.label is not None:
            first.setdefault(example.label, example)
    if len(first) < 2:
        raise SourceError(
            "all examples are of one class",
            file=spec.path,
            found=", ".join(map(repr, first)) or "no labels",
            expected="two classes or more",
        )
    count = _count(spec, config)
    known = _known(spec, config)
    if known and all(str(label) in known for label in first):
        return {label: known[str(label)] for label in first}
    numbers = {label: number for label in first if (number := _number(label)) is not None}
    if len(numbers) == len(first):
        for label, number in numbers.items():
            if number < 0 or (count is not None and number >= count):
                raise (
                    SourceError(
                        "a label is out of range",
                        found=f"label {label}",
                        expected="0 and up"
                        if count is None
                        else f"0 to {count - 1}: the model tells {count} classes apart",
                        do="number classes from 0, and take the model that was trained on them",
                    )
                    .at(**first[label].where)
                    .at(file=spec.path)
                )
        return numbers
    if spec.labels or (count is not None and len(first) != count):
        strange = next(label for label in first if str(label) not in known)
        raise (
            SourceError(
                "a label is none of the model's classes",
                found=repr(strange),
                expected=", ".join(known) if known else f"{count} classes, not {len(first)}",
                do=hint(strange, known, "list the classes under labels"),
            )
            .at(**first[strange].where)
            .at(file=spec.path)
        )
    return {label: i for i, label in enumerate(sorted(first, key=str))}


def _known(spec: DataSpec, config: Mapping[str, Any] | None) -> dict[str, int]:
    if spec.labels:
        return {name: i for i, name in enumerate(spec.labels)}
    found = (config or {}).get("label2id")
    if not isinstance(found, dict) or _made_up(found):
        return {}
    return {str(name): int(i) for name, i in found.items() if _number(i) is not None}


def _made_up(names: Mapping[str, object]) -> bool:
    """transformers calls classes LABEL_0, LABEL_1, ... where nobody has named them."""
    return all(str(name) == f"LABEL_{i}" for name, i in names.items())


def _count(spec: DataSpec, config: Mapping[str, Any] | None) -> int | None:
    if spec.labels:
        return len(spec.labels)
    found = config or {}
    for key in ("id2label", "label2id"):
        if isinstance(found.get(key), dict):
            return len(found[key])
    count = found.get("num_labels")
    return count if isinstance(count, int) else None


def _number(label: object) -> int | None:
    try:
        return int(str(label))
    except ValueError:
        return None
