"""The label of a tensor: for each axis which atoms it counts; and who stands beside whom.

An integer tensor may hold numbers of coordinates of an axis, as top-k returns them: that axis is
its ``values``, and ``selection`` tells which choice it was, so that two tensors looked up by the
same choice are known to belong together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from merge.tracing.atoms import Atom, Product, Ref, leaves, root_of

__all__ = ["Chosen", "Label", "blocks", "stands_beside"]


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Along some axes, each place belongs to one coordinate of ``values``: that of a selection.

    What is looked up by expert numbers has a place for each token where the expert axis was.
    """

    selection: int
    values: Product
    axes: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """Axes of a tensor; of what its values are numbers; what was chosen along which axes.

    ``parameter`` marks a parameter as it stands in the module, ``literal`` a constant that the code
    of the module writes down. Along ``uniform`` axes all values are the same, as in a mask that was
    expanded to all heads: what such an axis meets stays free of it. ``zero``: all values are 0.
    ``pending`` axes are frozen once the tensor is used, and not where only its shape is asked for.
    """

    axes: tuple[Product, ...]
    values: Product | None = None
    selection: int = 0
    chosen: tuple[Chosen, ...] = ()
    parameter: bool = False
    literal: bool = False
    uniform: frozenset[int] = frozenset()
    zero: bool = False
    pending: tuple[Product, ...] = ()

    @property
    def refs(self) -> Iterator[Ref]:
        """All occurrences on the axes."""
        return (ref for axis in self.axes for ref in axis)


def blocks(label: Label) -> Iterator[Counter[Atom]]:
    """How often each root stands in each block of the tensor, refined roots counted as well.

    A block is a choice of one part in every sum; a family goes by the choice in its selector.
    """
    extra = Counter[Atom]()
    for _, chosen in {c.selection: c for c in label.chosen}.items():
        extra.update({ref.root for ref in leaves(chosen.values)})
    yield from _expand(list(label.refs), [], extra, {})


def _expand(
    waiting: list[Ref], families: list[Ref], seen: Counter[Atom], choice: dict[Atom, int]
) -> Iterator[Counter[Atom]]:
    waiting, seen = list(waiting), seen.copy()
    while waiting:
        ref = waiting.pop()
        root = ref.root
        if root.kind == "family":
            families = [*families, ref]
            continue
        seen[root] += 1
        if root.kind == "product":
            waiting += ref.parts()[0]
        elif root.kind == "sum":
            for number, part in enumerate(ref.parts()):
                yield from _expand([*waiting, *part], families, seen, {**choice, root: number})
            return
    if not families:
        yield seen
        return
    ref, rest = families[0], families[1:]
    seen[ref.root] += 1
    selector = root_of(ref.root.selector)[0] if ref.root.selector else None
    numbers = [choice[selector]] if selector in choice else range(len(ref.parts()))
    for number in numbers:
        yield from _expand(list(ref.parts()[number]), rest, seen, choice)


def stands_beside(labels: list[Label], one: Atom, other: Atom) -> bool:
    """Whether in every label, wherever ``one`` stands, ``other`` stands exactly once beside it."""
    return all(
        block[other] == 1
        for number in dict.fromkeys(one.labels)
        for block in blocks(labels[number])
        if block[one]
    )
