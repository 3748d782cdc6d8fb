"""Batches of inputs cut to a number of examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from merge.errors import PlanError

__all__ = ["first_examples", "size_of", "some_of"]


def first_examples(batches: Iterable[Any], most: int) -> list[Any]:
    """The batches, of which the last is cut so that there are ``most`` examples at the most.

    PlanError where there are none.
    """
    found: list[Any] = []
    left = most
    for batch in batches:
        size = size_of(batch)
        found.append(batch if size <= left else some_of(batch, 0, left))
        left -= size
        if left <= 0:  # before another batch is loaded
            break
    if not found:
        raise PlanError(
            "there is no data to gather statistics on",
            found="no batches",
            expected="a few hundred examples of what the model is for",
        )
    return found


def size_of(inputs: Any) -> int:
    """Examples in a batch: the length of its first tensor."""
    return next((len(t) for t in _tensors(inputs) if t.ndim), 1)


def some_of(inputs: Any, start: int, stop: int) -> Any:
    """Some examples of a batch, in its own structure."""
    size = size_of(inputs)

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: cut(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(cut(v) for v in value)
        fits = hasattr(value, "ndim") and value.ndim and len(value) == size
        return value[start:stop] if fits else value

    return cut(inputs)


def _tensors(value: Any) -> Iterator[Any]:
    if hasattr(value, "ndim"):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)
