"""What is held in memory at a time: tensors in batches, so that a sweep reads each of them once.

Most groups stand in a few tensors, such as the units of one feed-forward layer; some stand in
tensors all over the network, such as the residual stream. The former are matched while the tensors
of their batch are held; for the latter, *spread* ones, scores are added up batch by batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from merge.alignment.families import Tree, members
from merge.symmetry.axes import factors_of
from merge.symmetry.symmetry import Layout, Symmetry, blocks

__all__ = ["Batch", "Passes", "is_quadratic", "passes_of"]

_TRIED = 16  # groups in most tensors, among which the next spread one is looked for


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors that are held together, and the trees that are matched on them."""

    names: tuple[str, ...]
    trees: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Passes:
    """How a sweep goes over the tensors.

    again: for each spread group the tensors that are read again when it is matched: those that it
    shares with another spread group, and those in which it stands twice.
    """

    batches: tuple[Batch, ...]
    spread: tuple[Tree, ...]
    again: Mapping[str, tuple[str, ...]]
    roots: Mapping[str, tuple[str, ...]]  # of each tensor, the trees that stand in it


def passes_of(symmetry: Symmetry, trees: Sequence[Tree], names: Sequence[str], hold: int) -> Passes:
    """Batches of at most ``hold`` elements where the groups allow it.

    names: the tensors, in the order in which they are best read.
    """
    owner = {t.group: tree.group for tree in trees for t in members(tree)}
    roots = {
        n: tuple(dict.fromkeys(owner[g] for g in symmetry.tensors[n].groups() if g in owner))
        for n in names
    }
    sizes = {n: math.prod(symmetry.tensors[n].shape) for n in names}
    by_group = {t.group: t for t in trees}
    spread: list[str] = []
    while True:
        found = _components(roots, spread)
        largest = max((c for c in found if c[1]), key=lambda c: _total(c[0], sizes), default=None)
        if largest is None or _total(largest[0], sizes) <= hold:
            break
        split = _best_split(largest, roots, sizes, spread, by_group)
        if split is None:
            break
        spread.append(split)
    batches = tuple(Batch(tuple(c), tuple(by_group[g] for g in local)) for c, local in found)
    again = {
        g: tuple(
            n
            for n in names
            if g in roots[n]
            and (sum(r in spread for r in roots[n]) > 1 or is_quadratic(symmetry.tensors[n], g))
        )
        for g in spread
    }
    return Passes(batches, tuple(t for t in trees if t.group in spread), again, roots)


def _best_split(
    component: tuple[list[str], list[str]],
    roots: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    spread: Sequence[str],
    trees: Mapping[str, Tree],
) -> str | None:
    """The group without which the component falls into the smallest parts; None if none helps."""
    names, local = component
    counts = {g: sum(g in roots[n] for n in names) for g in local if not trees[g].below}
    best: tuple[int, str] | None = None
    for group in sorted(counts, key=lambda g: -counts[g])[:_TRIED]:
        parts = _components({n: roots[n] for n in names}, [*spread, group])
        most = max((_total(c, sizes) for c, inner in parts if inner), default=0)
        if most < (_total(names, sizes) if best is None else best[0]) and len(local) > 1:
            best = (most, group)
    return best[1] if best else None


def _components(
    roots: Mapping[str, Sequence[str]], spread: Sequence[str]
) -> list[tuple[list[str], list[str]]]:
    """Tensors joined by groups that are not spread, with those groups; all in the given order."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.setdefault(name, name) != name:
            above[name] = above[above[name]]
            name = above[name]
        return name

    for name, groups in roots.items():
        for group in groups:
            if group not in spread:
                above[top(f"group {group}")] = top(f"tensor {name}")
    found: dict[str, tuple[list[str], dict[str, None]]] = {}
    for name, groups in roots.items():
        names, local = found.setdefault(top(f"tensor {name}"), ([], {}))
        names.append(name)
        local.update(dict.fromkeys(g for g in groups if g not in spread))
    return [(names, list(local)) for names, local in found.values()]


def _total(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    return sum(sizes[n] for n in names)


def is_quadratic(layout: Layout, group: str) -> bool:
    """Whether a group stands twice in a block: what a move is worth is then not linear in it."""
    if not any(f.group == group for axis in layout.axes for f in factors_of(axis)):
        return False
    return any(sum(f.group == group for f in block) > 1 for block in blocks(layout.axes))
