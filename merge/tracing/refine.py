"""Atoms taken apart: into products by views, into sums by slices."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from merge.tracing.atoms import Atom, Product, Reason, Ref, size_of

if TYPE_CHECKING:
    from merge.tracing.book import Book

__all__ = ["child", "concatenated", "cut", "cut_product", "expanded", "fresh", "partition", "split"]


def fresh(size: int, reason: Reason | None = None) -> Product:
    """A new axis of its own; frozen where a reason is given."""
    return () if size == 1 else (Ref(Atom(size, reason)),)


def expanded(product: Sequence[Ref]) -> list[Ref]:
    """The axis with its products taken apart; sums and families stay whole."""
    out: list[Ref] = []
    for ref in product:
        out += expanded(ref.parts()[0]) if ref.root.kind == "product" else [ref]
    return out


def concatenated(products: Sequence[Product]) -> Product:
    """One axis of several, one after the other."""
    products = [p for p in products if size_of(p)]
    if len(products) == 1:
        return products[0]
    whole = Atom(sum(size_of(p) for p in products), kind="sum", parts=list(products))
    return (Ref(whole, kids=list(products)),)


def child(root: Atom, size: int) -> Atom:
    """A part of a root: it has the freedom of the root and stands where the root stands."""
    return Atom(size, root.reason, root.rotates, root.self_dual, labels=list(root.labels))


def split(book: Book, ref: Ref, outer: int) -> Product | None:
    """The occurrence as a product whose first factor has size ``outer``; None if it cannot be."""
    book.collapse(ref.root)
    root = ref.root
    if root.kind == "product":
        halves = cut_product(book, ref.parts()[0], outer)
        return None if halves is None else (*halves[0], *halves[1])
    if root.kind != "plain" or outer < 2 or root.size % outer or root.size == outer:
        return None
    factors = (child(root, outer), child(root, root.size // outer))
    root.parts, root.kind = [tuple(Ref(f) for f in factors)], "product"
    return ref.parts()[0]


def cut_product(book: Book, product: Sequence[Ref], outer: int) -> tuple[Product, Product] | None:
    """Two axes whose product the axis is, the first of length ``outer``; None if it cannot be."""
    rest, taken = deque(expanded(product)), list[Ref]()
    while size_of(taken) < outer:
        wanted, odd = divmod(outer, size_of(taken))
        if odd or not rest:
            return None
        ref = rest.popleft()
        if ref.size <= wanted:
            taken.append(ref)
            continue
        halves = split(book, ref, wanted)
        if halves is None:
            return None
        rest.extendleft(reversed(expanded(halves)))
    return (tuple(taken), tuple(rest)) if size_of(taken) == outer else None


def cut(book: Book, product: Product, at: int) -> tuple[Product, Product] | None:
    """Two axes whose sum the axis is, the first of length ``at``; None if it cannot be."""
    flat = expanded(product)
    inner = tuple(flat[1:])
    here, odd = divmod(at, size_of(inner))
    if odd or not flat:
        return None
    for ref in inner:  # the same in both halves
        book.collapse(ref.root)
    halves = _cut_one(book, flat[0], here)
    return None if halves is None else ((*halves[0], *inner), (*halves[1], *inner))


def _cut_one(book: Book, ref: Ref, at: int) -> tuple[Product, Product] | None:
    book.collapse(ref.root)
    root = ref.root
    if root.kind == "product":
        return cut(book, ref.parts()[0], at)
    if root.kind == "plain":
        partition(root, [at, root.size - at])
    before, after = list[Product](), deque(ref.parts())
    while after and sum(map(size_of, before)) + size_of(after[0]) <= at:
        before.append(after.popleft())
    missing = at - sum(map(size_of, before))
    if missing:
        halves = cut(book, after.popleft(), missing)
        if halves is None:
            return None
        before.append(halves[0])
        after.appendleft(halves[1])
    return concatenated(before), concatenated(list(after))


def partition(root: Atom, sizes: Sequence[int]) -> None:
    """A plain atom becomes the sum of parts of these sizes."""
    kids = [child(root, n) for n in sizes]
    root.parts = [(Ref(k),) if k.size > 1 else () for k in kids]
    root.kind = "sum"
