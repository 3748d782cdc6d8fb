"""A rule for each operator: a function from a call to the labels of what it returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from merge.tracing.atoms import Product
from merge.tracing.book import Book
from merge.tracing.labels import Chosen, Label

__all__ = ["Call", "Rule", "Ruled", "as_list", "operators", "rule", "rule_of", "wrap"]

Ruled: TypeAlias = "Label | Sequence[Label | None] | None"
"""The label of the output, those of several outputs, or none where nothing is returned."""

Rule: TypeAlias = "Callable[[Call], Ruled]"

_RULES: dict[str, Rule] = {}


@dataclass(slots=True)
class Call:
    """One call of an operator: its arguments by name, what it returned, and how to find labels."""

    name: str
    arguments: dict[str, Any]
    out: Any
    book: Book
    label: Callable[[Tensor], Label]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def axes(self, name: str) -> list[Product]:
        """The axes of a tensor argument."""
        return list(self.label(self.arguments[name]).axes)

    def labels(self) -> list[Label]:
        """The labels of all tensor arguments."""
        found: list[Label] = []
        for value in self.arguments.values():
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, Tensor):
                    found.append(self.label(item))
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output, which is one tensor."""
        return tuple(self.out.shape)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Marks the rule of operators, by their names without ``aten::`` and the underscore behind."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def rule_of(name: str) -> Rule | None:
    """The rule of an operator; None where there is none."""
    return _RULES.get(name)


def operators() -> list[str]:
    """The names of all operators that have a rule."""
    return list(_RULES)


def as_list(dims: int | Sequence[int] | None, ndim: int) -> list[int]:
    """The dimensions that an operator names, counted from the front; all where it names none.

    >>> as_list(-1, 3), as_list([0, -2], 3), as_list(None, 2)
    ([2], [0, 1], [0, 1])
    """
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return list(range(ndim))
    listed = [dims] if isinstance(dims, int) else dims
    return [d % ndim for d in listed] if ndim else []


def wrap(axes: Sequence[Product], chosen: Sequence[Chosen] = ()) -> Label:
    """A label of axes alone."""
    return Label(tuple(axes), chosen=tuple(chosen))
