"""Which axes of a tensor are read and which are written: a map between widths treats them apart.

A unit is *written* by the rows of a linear map, its bias, the gains of a norm, an embedding; it is
*read* by the columns of the next map. Where units become more, their writers are copied and what
their readers take is shared out among the copies. A permutation does the same to both.

Said by the layout alone: a linear map or a convolution has its outputs first; a bias tells a map
that is stored the other way round; a table whose rows are looked up is written, a head that has no
group in its rows is read. A factor with a star is read wherever it stands, as the keys of heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from merge.symmetry.axes import Axis, Factor, factors_of
from merge.symmetry.symmetry import Layout, Symmetry

__all__ = ["counted", "inputs_of", "is_read", "resized", "starred_writers"]

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|proj_out|decoder|predictions|output_layer)\b")
_TABLE = re.compile(r"embed|(^|\.)(wte|wpe|shared)\b|token|position|relative_attention_bias")
_TABLE_REASONS = ("token", "grid")


def inputs_of(symmetry: Symmetry) -> dict[str, frozenset[int]]:
    """Of each tensor the axes along which a unit's activations are read."""
    return {name: _inputs(symmetry, name, layout) for name, layout in symmetry.tensors.items()}


def is_read(factor: Factor, inside: bool, flipped: frozenset[str] = frozenset()) -> bool:
    """Whether a factor of an axis is read. inside: the axis is one of `inputs_of`.

    flipped: groups whose stars mark the writers, from `starred_writers`.
    """
    if factor.group in flipped:
        return factor.form != "*"
    return inside or factor.form == "*"


def starred_writers(
    symmetry: Symmetry, inputs: Mapping[str, frozenset[int]] | None = None
) -> frozenset[str]:
    """The groups whose stars all stand where units are written, and nothing else does.

    Which of two sides has the star is convention; where a reader is listed before its writer it is
    the other way round.
    """
    inside = inputs_of(symmetry) if inputs is None else inputs
    seen: dict[str, set[tuple[bool, bool]]] = {}
    for name, layout in symmetry.tensors.items():
        for k, axis in enumerate(layout.axes):
            for factor in factors_of(axis):
                if factor.group is not None and factor.form != "|":
                    pair = (factor.form == "*", k in inside[name])
                    seen.setdefault(factor.group, set()).add(pair)
    return frozenset(g for g, pairs in seen.items() if pairs == {(True, False), (False, True)})


def counted(symmetry: Symmetry) -> frozenset[str]:
    """Groups that number whole modules, such as experts: they are chosen among, never mixed."""
    found = {layout.stack for layout in symmetry.tensors.values() if layout.stack}
    for layout in symmetry.tensors.values():
        if _first_counts(symmetry, layout):
            found.update(f.group for f in factors_of(layout.axes[0]) if f.group)
    return frozenset(found)


def _first_counts(symmetry: Symmetry, layout: Layout) -> bool:
    """Whether the first axis numbers modules whose weights are the rest of the tensor."""
    if len(layout.axes) < 2:
        return False
    first = [f.group for f in factors_of(layout.axes[0]) if f.group]
    rest = [f.group for axis in layout.axes[1:] for f in factors_of(axis) if f.group]
    return len(first) == 1 and any(first[0] in symmetry.groups[g].per for g in rest)


def _inputs(symmetry: Symmetry, name: str, layout: Layout) -> frozenset[int]:
    offset = int(_first_counts(symmetry, layout))
    axes = layout.axes[offset:]
    if len(axes) < 2:
        return frozenset()
    if not any(f.group for f in factors_of(axes[0])) and _is_table(name, layout):
        return frozenset()
    if _is_transposed(symmetry, name, layout, offset):
        return frozenset({offset})
    return frozenset(range(offset + 1, len(layout.axes)))


def _is_table(name: str, layout: Layout) -> bool:
    if _HEAD.search(name) and not _TABLE.search(name.rpartition("predictions")[2]):
        return False
    leading = [f for axis in layout.axes[:-1] for f in factors_of(axis)]
    alone = math.prod(layout.shape[:-1]) == 1
    return alone or any(f.reason in _TABLE_REASONS for f in leading) or bool(_TABLE.search(name))


def _is_transposed(symmetry: Symmetry, name: str, layout: Layout, offset: int) -> bool:
    """Whether inputs come first, as the bias tells."""
    stem, _, last = name.rpartition(".")
    bias = symmetry.tensors.get(f"{stem}.bias" if last == "weight" else f"{name}_bias")
    if bias is None or not bias.axes:
        return False
    own = str(bias.axes[-1])
    return own == str(layout.axes[offset + 1]) != str(layout.axes[offset])


def resized(symmetry: Symmetry, sizes: Mapping[str, int]) -> Symmetry:
    """The symmetry of the same network with other numbers of units: ``sizes`` of some groups."""
    groups = {n: replace(g, size=sizes.get(n, g.size)) for n, g in symmetry.groups.items()}

    def sized(factor: Factor) -> Factor:
        return replace(factor, size=sizes.get(factor.group or "", factor.size))

    tensors = {}
    for name, layout in symmetry.tensors.items():
        axes: tuple[Axis, ...] = tuple(axis.map(sized) for axis in layout.axes)
        shape = tuple(a.size for a in axes)
        tensors[name] = replace(layout, axes=axes, shape=shape)
    return replace(symmetry, groups=groups, tensors=tensors)
