"""Which groups of units may be taken apart, or gathered anew, and why others may not."""

from __future__ import annotations

import itertools

from merge.symmetry.roles import counted, is_read
from merge.symmetry.symmetry import Layout, Symmetry, blocks
from merge.transport.coupling import Roles

__all__ = ["separable"]

_GAINS = ("weight", "gamma", "scale")


def separable(symmetry: Symmetry, roles: Roles) -> tuple[list[str], dict[str, list[str]]]:
    """Groups whose units may be more or fewer, one at a time; by reason those that may not.

    A norm over a group sees all of its units, so that it has no copies; what is inside of heads
    goes with them.
    """
    above = {parent for g in symmetry.groups.values() for parent in g.per}
    several = counted(symmetry)
    normed = {g for name in symmetry.tensors for g in _normed(symmetry, name)}
    twice = {g for n, layout in symmetry.tensors.items() for g in _together(n, layout, roles)}
    found: list[str] = []
    reasons: dict[str, list[str]] = {}
    for name, group in symmetry.groups.items():
        if not group.flags:
            continue
        why = (
            "a norm over all of it" if name in normed
            else "in heads, or heads themselves" if group.per or name in above
            else "counts whole modules" if name in several
            else "returned by the network" if group.output
            else "written together with another group" if name in twice
            else None
        )  # fmt: skip
        if why is None:
            found.append(name)
        else:
            reasons.setdefault(why, []).append(name)
    return found, reasons


def _normed(symmetry: Symmetry, name: str) -> list[str]:
    """The group that a tensor is the gain of a norm over, other than BatchNorm's."""
    layout = symmetry.tensors[name]
    stem, _, last = name.rpartition(".")
    if len(layout.axes) != 1 or f"{stem}.running_mean" in symmetry.tensors:
        return []
    return layout.groups() if last in _GAINS else []


def _together(name: str, layout: Layout, roles: Roles) -> list[str]:
    """Groups that a block of the tensor writes along with others, as channels inside of groups."""
    inside = roles.inputs[name]
    found: list[str] = []
    for chains in itertools.product(*(list(blocks((axis,))) for axis in layout.axes)):
        names = [
            str(f.group)
            for k, chain in enumerate(chains)
            for f in chain
            if f.group is not None and not is_read(f, k in inside, roles.flipped)
        ]
        found += names if len(names) > 1 else []
    return found
