"""What a trace has collected so far: labels and equations; joining and freezing axes.

Everything here may only take freedom away. Where two axes cannot be brought to a common refinement
both are frozen, which is sound and loses something; the reason says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from merge.tracing import families
from merge.tracing.atoms import Atom, Equation, Product, Reason, Ref, leaves, size_of
from merge.tracing.labels import Label
from merge.tracing.refine import cut, expanded, split

__all__ = ["MISFIT", "Book", "Pair"]

Pair: TypeAlias = tuple[Ref, Ref]
MISFIT = Reason("shape", "two lengths without a common refinement")


@dataclass(slots=True)
class Book:
    """The labels of all tensors seen, by number, and the equations on charges."""

    equations: list[Equation] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    choices: dict[object, int] = field(default_factory=dict)

    def choice(self, key: object = None) -> int:
        """The number of a new selection; the same one for the same key."""
        return self.choices.setdefault(object() if key is None else key, len(self.choices) + 1)

    def record(self, label: Label) -> Label:
        """Enter the label: whatever stands in it was seen together."""
        families.settle(self, label)
        self.labels.append(label)
        for ref in label.refs:
            enter(ref.root, [len(self.labels) - 1])
        return label

    # -- less freedom ----------------------------------------------------------------------------
    def freeze(self, product: Sequence[Ref], reason: Reason) -> None:
        """Nothing may be done to these coordinates any more."""
        for ref in product:
            freeze_atom(ref.root, reason)

    def fix_rotation(self, product: Sequence[Ref]) -> None:
        """No more rotations: an operation works on each coordinate on its own."""
        for ref in leaves(product):
            ref.root.rotates = False

    def neutral(self, product: Sequence[Ref], *, signs: bool = True, scales: bool = True) -> None:
        """No rotations, and signs and scales may not act here."""
        self.fix_rotation(product)
        for ref in product:
            self.equations.append(Equation(((1, ref),), signs, scales))

    def equate(self, *terms: tuple[int, Ref], signs: bool = True, scales: bool = True) -> None:
        """The charges times the factors sum up to nothing."""
        self.equations.append(Equation(terms, signs, scales))

    def collapse(self, root: Atom) -> None:
        """A family becomes one atom after all: what was done to one member is done to each."""
        if root.kind != "family":
            return
        first, *others = root.parts
        for other in others:
            self.match(first, other)
        for ref in root.refs:
            for kid in ref.kids or ():
                self.equate((1, ref), (-1, kid[0]))
            ref.kids = None
        link(root, first[0].root, first[0].parity)

    # -- two axes become one ---------------------------------------------------------------------
    def same(self, one: Product, other: Product) -> None:
        """The axes are moved alike, as the operands of a sum are."""
        for a, b in self.match(one, other):
            self.equate((1, a), (-1, b))

    def contract(self, one: Product, other: Product) -> None:
        """The axes are summed over together: what is done to one is undone in the other."""
        for a, b in self.match(one, other, dual=True):
            self.equate((1, a), (1, b))

    def times(self, one: Product, other: Product, *, inverse: bool = False) -> Product:
        """The axis of an elementwise product (or quotient) of the two."""
        pairs = self.match(one, other)
        self.fix_rotation(one)
        self.fix_rotation(other)
        out = tuple(Ref(a.atom, a.dual) for a, _ in pairs)
        for (a, b), ref in zip(pairs, out, strict=True):
            self.equate((1, a), (-1 if inverse else 1, b), (-1, ref))
        return out or one

    def match(self, one: Product, other: Product, *, dual: bool = False) -> list[Pair]:
        """Join two axes, both being refined as far as is needed.

        Returns pairs of occurrences of the same atoms; none where the axes do not fit, and are
        frozen.
        """
        self._match(one, other, dual)
        left, right = expanded(one), expanded(other)
        if [r.size for r in left] != [r.size for r in right]:
            return []
        return list(zip(left, right, strict=True))

    def _match(self, one: Product, other: Product, dual: bool) -> None:
        left, right = deque(expanded(one)), deque(expanded(other))
        while left and right:
            a, b = left.popleft(), right.popleft()
            if a.size == b.size:
                self._join(a, b, dual)
                continue
            long, short = (a, b) if a.size > b.size else (b, a)
            halves = split(self, long, short.size)
            if halves is None:
                self.freeze([*one, *other], MISFIT)
                return
            (left if long is a else right).extendleft(reversed(expanded(halves)))
            (right if long is a else left).appendleft(short)
        if left or right:
            self.freeze([*one, *other], MISFIT)

    def _join(self, a: Ref, b: Ref, dual: bool) -> None:
        """Join two occurrences of one size, neither of them a product."""
        one, other, parity = a.root, b.root, a.parity ^ b.parity ^ dual
        if one is other:
            for ref in leaves([a]) if parity else ():
                ref.root.self_dual = True
        elif not families.agree(self, one, other):
            for root in (one, other):
                self.collapse(root)
            self._match((a,), (b,), dual)
        elif one.kind == "plain" or other.kind == "plain":
            low, high = (one, other) if one.kind == "plain" else (other, one)
            link(low, high, parity)
        else:
            self._join_sums(a.parts(), b.parts(), dual)
            if a.root is not b.root:
                link(a.root, b.root, a.parity ^ b.parity ^ dual)

    def _join_sums(self, one: Sequence[Product], other: Sequence[Product], dual: bool) -> None:
        """Join part by part; a part that is longer than its partner is cut."""
        left, right = deque(one), deque(other)
        while left and right:
            a, b = left.popleft(), right.popleft()
            if size_of(a) == size_of(b):
                self._match(a, b, dual)
                continue
            long, short = (a, b) if size_of(a) > size_of(b) else (b, a)
            halves = cut(self, long, size_of(short))
            if halves is None:
                for part in (*one, *other):
                    self.freeze(part, MISFIT)
                return
            (left if long is a else right).extendleft(reversed(halves))
            (right if long is a else left).appendleft(short)


def freeze_atom(root: Atom, reason: Reason) -> None:
    """Freeze a root and all that it was refined to; the first reason stays."""
    if root.kind == "plain":
        root.reason = root.reason or reason
    for part in root.parts:
        for ref in part:
            freeze_atom(ref.root, reason)


def enter(root: Atom, labels: Sequence[int]) -> None:
    """The root, and what it was refined to, stand in these labels."""
    root.labels += labels
    for part in root.parts:
        for ref in part:
            enter(ref.root, labels)


def link(low: Atom, high: Atom, parity: bool) -> None:
    """``low`` becomes another name of ``high``, which keeps the freedom that both had."""
    low.link, low.parity = high, parity
    if low.reason is not None:
        freeze_atom(high, low.reason)
    if low.kind == "plain":
        for atom in leaf_atoms(high):
            atom.rotates &= low.rotates
            atom.self_dual |= low.self_dual
    high.refs += low.refs
    enter(high, low.labels)


def leaf_atoms(root: Atom) -> list[Atom]:
    """The plain roots that a root was refined to; itself where it was not."""
    if root.kind == "plain":
        return [root]
    return [atom for part in root.parts for ref in part for atom in leaf_atoms(ref.root)]
