"""What may be exchanged in a model, as rows to be printed: groups, patterns of tensors, reasons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from merge.errors import RecipeError, hint
from merge.symmetries import symmetry_of
from merge.symmetry.axes import Axis, Factor, factors_of, named
from merge.symmetry.symmetry import Group, Symmetry

__all__ = ["axes_of", "explained"]

MOVES = {
    "P": "permuted",
    "S": "turned in sign",
    "D": "scaled by positive numbers",
    "R": "rotated",
}


def axes_of(model: object, *, spec: object = None) -> dict[str, Any]:
    """Groups and tensors of the model's symmetry, as plain data.

    Groups that differ in their layers' numbers only are one row, with the number of them; so are
    tensors of one pattern.
    """
    symmetry = symmetry_of(model, spec=spec)
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    for group in symmetry.groups.values():
        loose = _loose(group.name)
        key = (loose, group.size, group.flags, tuple(map(_loose, group.per)), group.reason)
        row = groups.setdefault(key, {**_row(group), "group": loose, "count": 0})
        row["count"] += 1
    tensors: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, layout in symmetry.tensors.items():
        texts = tuple(str(named(a, _loose)) for a in layout.axes)
        loose = layout.pattern or _loose(name)
        row = tensors.setdefault(
            (loose, *texts), {"pattern": loose, "axes": list(texts), "tensors": 0}
        )
        row["tensors"] += 1
    axes = [axis for layout in symmetry.tensors.values() for axis in layout.axes]
    words = {factor.reason for axis in axes for factor in factors_of(axis)}
    return {
        "groups": list(groups.values()),
        "tensors": list(tensors.values()),
        "frozen": {w: text for w, text in symmetry.reasons.items() if w in words},
        "notes": list(symmetry.notes),
    }


def _row(group: Group) -> dict[str, Any]:
    return {
        "group": group.name,
        "size": group.size,
        "flags": group.flags,
        "per": [_loose(p) for p in group.per],
        "reason": group.reason,
    }


def _loose(name: str) -> str:
    """A name with its numbers replaced by '#'.

    >>> _loose("f3_1")
    'f#_#'
    """
    return re.sub(r"\d+", "#", name)


def explained(model: object, name: str, *, spec: object = None) -> list[str]:
    """Lines that say of a tensor's axes, or of a group, what may be done to it and why not more.

    `RecipeError` where the model has neither a tensor nor a group of that name.
    """
    symmetry = symmetry_of(model, spec=spec)
    if name in symmetry.tensors:
        layout = symmetry.tensors[name]
        lines = [f"{name}: {', '.join(map(str, layout.axes)) or 'no axes'}"]
        for number, axis in enumerate(layout.axes):
            lines.append(f"  axis {number}, length {layout.shape[number]}: {axis}")
            lines += [f"    {line}" for line in _axis_lines(symmetry, axis)]
        return lines
    if name in symmetry.groups:
        found = Counter(symmetry.tensors[t].pattern or t for t in symmetry.places(name))
        places = [f"  in {pattern}, {count} tensors" for pattern, count in found.items()]
        return [_group_line(symmetry.groups[name]), *places]
    raise RecipeError(
        "the model has no tensor and no group of that name",
        found=name,
        do=hint(
            name, [*symmetry.tensors, *symmetry.groups], "merge inspect MODEL --axes lists them"
        ),
    )


def _axis_lines(symmetry: Symmetry, axis: Axis) -> Iterator[str]:
    for factor in dict.fromkeys(factors_of(axis)):
        if factor.group is None:
            yield _fixed_line(symmetry, factor)
        else:
            yield _group_line(symmetry.groups[factor.group])


def _fixed_line(symmetry: Symmetry, factor: Factor) -> str:
    why = symmetry.reasons.get(factor.reason, "no reason is recorded")
    return f"{factor}: fixed, {factor.size} places: {why if factor.size > 1 else 'a single place'}"


def _group_line(group: Group) -> str:
    if not group.flags:
        return (
            f"{group.name}: frozen, {group.size} coordinates: {group.reason or 'no reason known'}"
        )
    moves = [text for flag, text in MOVES.items() if flag in group.flags]
    if set("SDR") <= set(group.flags):
        moves = ["moved by any invertible matrix"]
    text = f"{group.name}: {group.size} coordinates that may be {' or '.join(moves)}"
    return text + (
        f", in another way for each index of {', '.join(group.per)}" if group.per else ""
    )
