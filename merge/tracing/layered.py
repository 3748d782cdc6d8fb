"""Frozen groups that span layers, one for each layer.

The coordinates that rotary tables multiply are frozen together in all layers, since all layers use
the same tables. What is frozen need not be one group; as one for each layer it has a name like all
other groups of a layer, and layers of two kinds of tables are alike.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from merge.symmetry.axes import Axis, Factor
from merge.symmetry.symmetry import Group, Symmetry
from merge.tracing.stacks import Stacks

__all__ = ["by_layer"]

Numbers = tuple[tuple[str, int], ...]


def by_layer(symmetry: Symmetry) -> Symmetry:
    """The symmetry with its frozen groups split by the layers of the tensors that have them."""
    stacks = Stacks.of(symmetry.tensors)
    layers: dict[str, dict[Numbers, None]] = defaultdict(dict)
    for name, layout in symmetry.tensors.items():
        for own in layout.groups():
            layers[own][stacks.numbers(name)] = None
    frozen = {n for n, g in symmetry.groups.items() if not g.flags and len(layers[n]) > 1}
    for child in symmetry.groups.values():
        if len(layers[child.name]) > 1:  # it goes by its parents, in several layers at once
            frozen -= set(child.per)
    names = {
        (name, numbers): f"{name}_{count}"
        for name in frozen
        for count, numbers in enumerate(layers[name])
    }
    groups: dict[str, Group] = {}
    for name, group in symmetry.groups.items():
        if name in frozen:
            parts = [names[name, numbers] for numbers in layers[name]]
            groups |= {n: replace(group, name=n) for n in parts}
        else:
            numbers = next(iter(layers[name]), ())
            per = tuple(names.get((p, numbers), p) for p in group.per)
            groups[name] = replace(group, per=per)

    def split(axis: Axis, numbers: Numbers) -> Axis:
        def named(factor: Factor) -> Factor:
            return replace(factor, group=names.get((factor.group or "", numbers), factor.group))

        return axis.map(named)

    tensors = {
        name: replace(layout, axes=tuple(split(a, stacks.numbers(name)) for a in layout.axes))
        for name, layout in symmetry.tensors.items()
    }
    return replace(symmetry, groups=groups, tensors=tensors)
