"""Atoms: sets of interchangeable coordinates, joined and taken apart while a network is traced.

An atom is a node of a union-find with a dual bit (its parity to the root). A root may be refined,
once and for good, and then stands for what it was refined to:

product   n = a x b, by a view into heads
sum       n = a + b, by a slice or a concatenation
family    n for each part of another atom, the selector: a copy of n for q, for k and for v, where
          these are parts of one tensor

A `Ref` is one occurrence of an atom in the label of a tensor. Signs and scales of an atom act on an
occurrence to some power, its charge: 1 in the rows of a map, -1 in the columns of the next, 0 in a
gain. Operations put linear equations on charges; `merge.tracing.charges` solves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = ["Atom", "Equation", "Kind", "Product", "Reason", "Ref", "leaves", "root_of", "size_of"]

Kind = Literal["plain", "product", "sum", "family"]
Product: TypeAlias = "tuple[Ref, ...]"
"""An axis: occurrences from the outer to the inner; an axis of length 1 has none."""

_count = iter(range(1 << 62))


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an atom is frozen: a word for specs, and what the word stands for."""

    word: str
    text: str


@dataclass(slots=True, eq=False)
class Atom:
    """A node of the union-find. What is not ``size`` or ``link`` counts on roots only."""

    size: int
    reason: Reason | None = None  # frozen where it is not None
    rotates: bool = True
    self_dual: bool = False
    link: Atom | None = None
    parity: bool = False  # to the link
    kind: Kind = "plain"
    parts: list[Product] = field(default_factory=list)
    selector: Atom | None = None
    refs: list[Ref] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    number: int = field(default_factory=lambda: next(_count))

    @property
    def frozen(self) -> bool:
        """Whether the root may not even be permuted."""
        return self.reason is not None


@dataclass(slots=True, eq=False)
class Ref:
    """One occurrence of an atom, or of its dual."""

    atom: Atom
    dual: bool = False
    kids: list[Product] | None = None
    number: int = field(default_factory=lambda: next(_count))

    def __post_init__(self) -> None:
        root_of(self.atom)[0].refs.append(self)

    @property
    def root(self) -> Atom:
        """The atom's root."""
        return root_of(self.atom)[0]

    @property
    def parity(self) -> bool:
        """Whether it is the root's dual."""
        return self.dual ^ root_of(self.atom)[1]

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return self.atom.size

    def parts(self) -> list[Product]:
        """Occurrences of what the root was refined to: one product, the parts of a sum or family.

        They are the same objects each time.
        """
        if self.kids is None:
            root, parity = self.root, self.parity
            self.kids = [
                tuple(Ref(r.atom, r.dual ^ parity) for r in product) for product in root.parts
            ]
        return self.kids


@dataclass(frozen=True, slots=True)
class Equation:
    """A sum of charges, each times a factor, is zero: for signs, for scales, or for both."""

    terms: tuple[tuple[int, Ref], ...]
    signs: bool = True
    scales: bool = True


def root_of(atom: Atom) -> tuple[Atom, bool]:
    """The root of an atom and whether the atom is its dual; paths are shortened on the way."""
    path: list[Atom] = []
    parity = False
    while atom.link is not None:
        path.append(atom)
        atom = atom.link
    for node in reversed(path):
        parity ^= node.parity
        node.link, node.parity = atom, parity
    return atom, parity


def size_of(product: Sequence[Ref]) -> int:
    """Length of an axis."""
    size = 1
    for ref in product:
        size *= ref.size
    return size


def leaves(product: Sequence[Ref]) -> Iterator[Ref]:
    """All occurrences that are not refined, in order; of a family, those of each member."""
    for ref in product:
        if ref.root.kind == "plain":
            yield ref
        else:
            for part in ref.parts():
                yield from leaves(part)
