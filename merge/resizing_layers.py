"""The layers of a network in one another's coordinates, so that they can be averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge import symmetries
from merge.alignment.moved import moved
from merge.alignment.weight import match_weights
from merge.errors import PlanError
from merge.families.layers import place_of
from merge.ir.checkpoint import Checkpoint
from merge.stream import TensorsOf
from merge.symmetry.axes import factors_of
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from torch import Tensor

    from merge.blocks import Blocks

__all__ = ["aligned_layers"]


def aligned_layers(checkpoint: Checkpoint, blocks: Blocks) -> Checkpoint:
    """The same function, with the units inside of each layer in the order of the layer before.

    Units inside are those of groups that are in no other layer: of the feed-forward part, heads and
    what is in them. The residual stream is common to all layers and stays.
    """
    own = symmetries.symmetry_of(checkpoint)
    names = {n: _names(own, blocks, n) for n in range(blocks.count)}
    inner = {n: _inner(own, set(names[n].values())) for n in names}
    layouts = {n: own.tensors[n] for n in names[0].values()}
    present = dict.fromkeys(g for layout in layouts.values() for g in layout.groups())
    first = Symmetry({g: own.groups[g] for g in present}, layouts, own.reasons)
    keep = [g for g in present if g not in inner[0]]
    current = checkpoint
    for number in range(1, blocks.count):
        before = _View(current, {names[0][r]: names[number - 1][r] for r in names[0]})
        this = _View(current, {names[0][r]: names[number][r] for r in names[0]})
        match = match_weights(first, before, this, keep=keep)
        called = _called(own, names[0], names[number])
        element = {called[g]: move for g, move in match.element.items()}
        current = moved(current, own, element)
    return replace(current, label=checkpoint.label)


class _View:
    """The tensors of one layer under the names of another."""

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str]) -> None:
        self._tensors = TensorsOf(checkpoint)
        self._names = names

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        return self._tensors.read(self._names[name], first, last)


def _names(own: Symmetry, blocks: Blocks, number: int) -> dict[str, str]:
    """The tensors of a layer by what their names end with."""
    found = {}
    for name in own.tensors:
        place = place_of(name)
        if place is not None and place[:2] == (blocks.stack, number):
            found[place[2]] = name
    return found


def _inner(own: Symmetry, names: set[str]) -> set[str]:
    """Groups that no tensor outside of a layer has."""
    inside = {g for n in names for g in own.tensors[n].groups()}
    outside = {g for n, layout in own.tensors.items() if n not in names for g in layout.groups()}
    return inside - outside


def _called(own: Symmetry, first: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """What the groups of the first layer are called in another; PlanError unless they are alike."""
    found: dict[str, Any] = {}
    for rest, name in first.items():
        if rest not in other:
            raise PlanError("the layers are not all of one kind", tensor=name)
        for ours, theirs in zip(own.tensors[name].axes, own.tensors[other[rest]].axes, strict=True):
            for a, b in zip(factors_of(ours), factors_of(theirs), strict=True):
                if a.group is not None and b.group is not None:
                    found[a.group] = b.group
    return found
