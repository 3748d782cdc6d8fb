"""The symmetry of one checkpoint: concrete groups with sizes, and every tensor's axes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from merge.symmetry.axes import Axis, Factor, factors_of

__all__ = ["Group", "Layout", "Symmetry", "blocks"]


@dataclass(frozen=True, slots=True)
class Group:
    """``size`` coordinates that may be moved together in the ways of ``flags`` (of P, S, D, R).

    Where ``per`` is not empty, they may be moved in another way for each index of those groups.
    A group without flags stays; ``reason`` says why.
    """

    name: str
    size: int
    flags: str = "P"
    per: tuple[str, ...] = ()
    output: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """The axes of one tensor.

    In a checkpoint that has a tensor for each expert, they are the slices of one stacked tensor:
    ``stack`` is the group that counts them, ``member`` this one's number, ``siblings`` the names of
    all of them in order.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    pattern: str = ""
    stack: str = ""
    member: int = 0
    siblings: tuple[str, ...] = ()

    def groups(self) -> list[str]:
        """The groups that the tensor has, each once, in order."""
        found = [f.group for axis in self.axes for f in factors_of(axis) if f.group is not None]
        return list(dict.fromkeys([*found, *([self.stack] if self.stack else [])]))


@dataclass(frozen=True, slots=True)
class Symmetry:
    """What may be exchanged in one checkpoint, by group and by tensor.

    ``reasons`` explains the words of fixed factors; ``notes`` is what the derivation had to say.
    """

    groups: Mapping[str, Group]
    tensors: Mapping[str, Layout]
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def copies(self, group: str) -> int:
        """In how many independent ways the group may be moved: the product of its parents' sizes.

        One where it depends on nothing.
        """
        count = 1
        for parent in self.groups[group].per:
            count *= self.groups[parent].size
        return count

    def places(self, group: str) -> list[str]:
        """The tensors that have the group, in order."""
        return [name for name, layout in self.tensors.items() if group in layout.groups()]


def blocks(axes: tuple[Axis, ...]) -> Iterator[tuple[Factor, ...]]:
    """The factors of each block of a tensor: one for each choice of a part in every sum.

    >>> from merge.symmetry.axes import parse_axis
    >>> [".".join(map(str, b)) for b in blocks((parse_axis("h.(q+k)"), parse_axis("d")))]
    ['h.q.d', 'h.k.d']
    """
    for choice in itertools.product(*(list(_chains(axis)) for axis in axes)):
        yield tuple(f for chain in choice for f in chain)


def _chains(axis: Axis) -> Iterator[tuple[Factor, ...]]:
    for product in axis.parts:
        options = [list(_chains(f)) if isinstance(f, Axis) else [(f,)] for f in product]
        for choice in itertools.product(*options):
            yield tuple(f for chain in choice for f in chain)
