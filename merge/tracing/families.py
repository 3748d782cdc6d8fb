"""Families: coordinates that are other ones in each part of the axis beside them.

Where one map makes queries, keys and values, its rows are numbered by part, head and unit, and the
parts are then taken apart. Until then all tensors that have the units have the part beside them: so
the units of each part are atoms of their own, although one tensor holds them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from merge.tracing.atoms import Atom, Product, Ref, root_of, size_of
from merge.tracing.labels import Label, blocks, stands_beside
from merge.tracing.refine import child, concatenated, expanded, fresh, partition

if TYPE_CHECKING:
    from merge.tracing.book import Book

__all__ = ["agree", "narrow", "selector_of", "settle", "stacked"]

Path: TypeAlias = "tuple[tuple[Atom, int], ...]"
"""Which part was taken of which sums, from the outer to the inner."""


def narrow(book: Book, label: Label, axis: int, start: int, stop: int) -> list[Product] | None:
    """The axes of ``tensor[..., start:stop]``; None where the cut meets no boundary of factors."""
    pieces = _pieces(book, label, label.axes[axis], (start, stop), ())
    if pieces is None:
        return None
    own = [product for _, product in pieces]
    common = _common_end(own)
    whole = concatenated([p[: len(p) - common] for p in own])
    out: list[Product] = []
    for number, product in enumerate(label.axes):
        if number == axis:
            out.append((*whole, *own[0][len(own[0]) - common :]))
            continue
        members = [_along(product, path) for path, _ in pieces]
        refs = zip(*members, strict=False)
        same = all(len(m) == len(members[0]) for m in members)
        out.append(tuple(_family(whole, list(r)) for r in refs) if same else members[0])
        if not same:
            for member in members[1:]:
                book.same(members[0], member)
    return out


def stacked(book: Book, labels: Sequence[Label]) -> list[Product]:
    """A new axis that counts the labels, then the axes of all of them together."""
    count = len(labels)
    whole: Product = ()
    if count > 1:
        whole = (Ref(Atom(count, kind="sum", parts=[()] * count)),)
    axes = [whole]
    for products in zip(*(label.axes for label in labels), strict=True):
        columns = list(zip(*map(expanded, products), strict=False))
        alike = all(len({r.size for r in column}) == 1 for column in columns)
        roots = {tuple(r.root for r in expanded(p)) for p in products}
        if count > 16 or not alike or len({len(r) for r in roots}) > 1 or len(roots) == 1:
            for other in products[1:]:
                book.same(products[0], other)
            axes.append(products[0])
        else:
            axes.append(tuple(_family(whole, list(column)) for column in columns))
    return axes


def _common_end(products: Sequence[Product]) -> int:
    """How many occurrences at the end are the same in all of several products."""
    if len(products) == 1:
        return 0
    count = 0
    for refs in zip(*(reversed(p) for p in products), strict=False):
        if any(r is not refs[0] for r in refs) or any(len(p) == count + 1 for p in products):
            break
        count += 1
    return count


def _pieces(
    book: Book, label: Label, product: Product, span: tuple[int, int], way: Path
) -> list[tuple[Path, Product]] | None:
    """The parts that lie within the span, each with the way to it; ``way`` led here."""
    flat = expanded(product)
    if not flat:
        return [((), product)]
    inner = tuple(flat[1:])
    (first, odd), (last, rest) = (divmod(n, size_of(inner)) for n in span)
    if odd or rest:
        return None
    found = _of_ref(book, label, flat[0], (first, last), way)
    if found is None:
        return None
    return [(path, (*part, *_along(inner, path))) for path, part in found]


def _of_ref(
    book: Book, label: Label, ref: Ref, span: tuple[int, int], way: Path
) -> list[tuple[Path, Product]] | None:
    start, stop = span
    if (start, stop) == (0, ref.size):
        return [((), (ref,))]
    book.collapse(ref.root)
    root = ref.root
    if root.kind == "product":
        return _pieces(book, label, (ref,), span, way)
    if root.kind == "plain" and root.frozen:
        return [((), fresh(stop - start, root.reason))]
    if root.kind == "plain":
        single = stop - start == 1 and root.size <= 64
        ends = [1] * root.size if single else [start, stop - start, root.size - stop]
        partition(root, [n for n in ends if n])
        _distribute(book, label, root, way)
    out: list[tuple[Path, Product]] = []
    at = 0
    for number, part in enumerate(ref.parts()):
        low, high = max(start, at), min(stop, at + size_of(part))
        if low < high and (low, high) != (at, at + size_of(part)):
            here = (*way, (root, number))
            inside = _pieces(book, label, part, (low - at, high - at), here)
            if inside is None:
                return None
            out += [(((root, number), *path), p) for path, p in inside]
        elif low < high:
            out.append((((root, number),), part))
        at += size_of(part)
    return out


def _distribute(book: Book, label: Label, selector: Atom, way: Path) -> None:
    """What stood beside ``selector`` wherever it was seen becomes a family over its parts."""
    for ref in [r for axis in label.axes for r in _along(axis, way)]:
        root = ref.root
        if root.kind != "plain" or root.frozen or root is selector:
            continue
        if stands_beside(book.labels, root, selector):
            kids = [child(root, root.size) for _ in selector.parts]
            root.parts, root.kind = [(Ref(k),) for k in kids], "family"
            root.selector = selector


def _along(product: Sequence[Ref], path: Path) -> Product:
    """The axis where the parts on the path were taken: members instead of families."""
    out: list[Ref] = []
    for ref in expanded(product):
        members: Product = (ref,)
        for selector, number in path:
            root = members[0].root if len(members) == 1 else None
            if root is not None and root.kind == "family" and selector_of(root) is selector:
                members = members[0].parts()[number]
        out += members
    return tuple(out)


def _family(whole: Product, members: list[Ref]) -> Ref:
    """One occurrence for the members that go with the parts of ``whole``."""
    if all(m is members[0] for m in members):
        return members[0]
    root = Atom(members[0].size, kind="family", parts=[(m,) for m in members])
    root.selector = whole[0].root
    return Ref(root, kids=[(m,) for m in members])


def selector_of(root: Atom) -> Atom:
    """The root of a family's selector."""
    return root_of(root.selector or root)[0]


def agree(book: Book, one: Atom, other: Atom) -> bool:
    """Whether two atoms, one of them perhaps a family, can be joined without a collapse."""
    if one.kind == "family" and other.kind == "family":
        return selector_of(one) is selector_of(other) and len(one.parts) == len(other.parts)
    for family, single in ((one, other), (other, one)):
        if family.kind == "family":
            selector = selector_of(family)
            plain = single.kind == "plain" and not single.frozen
            return plain and stands_beside(book.labels, single, selector)
    return True


def settle(book: Book, label: Label) -> None:
    """Collapse the families that stand in the label without their selector."""
    while wrong := _unselected(label):
        book.collapse(wrong)


def _unselected(label: Label) -> Atom | None:
    for block in blocks(label):
        for root in block:
            if root.kind == "family" and block[selector_of(root)] != 1:
                return root
    return None
