"""From the symmetry of one network to a spec with patterns: layer numbers become letters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from merge.symmetry.axes import Axis, factors_of, named
from merge.symmetry.patterns import LETTERS
from merge.symmetry.spec import GroupSpec, Spec
from merge.symmetry.symmetry import Layout, Symmetry
from merge.tracing.naming import Called
from merge.tracing.stacks import Stacks

__all__ = ["generalised"]

Numbers = tuple[int, ...]
Axes = tuple[Axis, ...]
Suffix = tuple[str, ...]
"""What stands for the numbers of a name from some place on: literal numbers or braces."""


def generalised(symmetry: Symmetry, names: Mapping[str, Called], model: str = "") -> Spec:
    """The spec of which this is the symmetry for one number of layers.

    Names of tensors that differ in numbers of layers share a pattern where their axes are the same.
    Sizes are those of the network where all groups of a kind agree on one.
    """
    stacks = Stacks.of(".".join(_parts(n, lay, names)) for n, lay in symmetry.tensors.items())
    families: dict[tuple[str, ...], dict[Numbers, Axes]] = defaultdict(dict)
    for name, layout in symmetry.tensors.items():
        parts = _parts(name, layout, names)
        loose = tuple("#" if p.isdigit() else p for p in parts)
        numbers = tuple(int(p) for p in parts if p.isdigit())
        axes = tuple(_open(named(a, lambda g: names[g].pattern)) for a in layout.axes)
        families[loose][numbers] = axes
    tensors: dict[str, Axes] = {}
    for loose, members in families.items():
        layers = [
            stacks.is_layer(["0" if p == "#" else p for p in loose], at)
            for at, p in enumerate(loose)
            if p == "#"
        ]
        for suffix, axes in _cover(members, 0, layers):
            numbers_left = iter(suffix)
            pattern = ".".join(next(numbers_left) if p == "#" else p for p in loose)
            tensors[pattern] = axes
    words = {f.reason for axes in tensors.values() for a in axes for f in factors_of(a)}
    reasons = {w: text for w, text in symmetry.reasons.items() if w in words}
    return Spec(model, _groups(symmetry, names), tensors, reasons, symmetry.notes)


def _parts(name: str, layout: Layout, names: Mapping[str, Called]) -> list[str]:
    """The name's components, the group that counts stacked tensors in place of a number."""
    parts = name.split(".")
    if layout.stack:
        others = [s.split(".") for s in layout.siblings]
        at = next(k for k in range(len(parts)) if len({o[k] for o in others}) > 1)
        parts[at] = f"{{{names[layout.stack].pattern}}}"
    return parts


def _open(axis: Axis) -> Axis:
    """The axis without the sizes of this network; a fixed part within an axis keeps its own."""
    whole = len(list(factors_of(axis))) == 1
    return axis.map(lambda f: f if f.group is None and not whole else replace(f, size=0))


def _cover(
    members: Mapping[Numbers, Axes], place: int, layers: Sequence[bool]
) -> list[tuple[Suffix, Axes]]:
    """Patterns for the numbers from ``place`` on, which match each member once."""
    if place == len(layers):
        return [((), next(iter(members.values())))]
    values = sorted({numbers[place] for numbers in members})
    covers = {
        value: _cover({n: a for n, a in members.items() if n[place] == value}, place + 1, layers)
        for value in values
    }
    runs: list[list[int]] = []
    for value in values:
        if runs and _plain(covers[runs[-1][0]]) == _plain(covers[value]):
            runs[-1].append(value)
        else:
            runs.append([value])
    out: list[tuple[Suffix, Axes]] = []
    letter = LETTERS[place]
    for run in runs:
        if layers[place] and run is runs[-1]:
            more = f">{runs[-2][-1]}" if len(runs) > 1 else ""
            out += [((f"{{{letter}{more}}}", *rest), axes) for rest, axes in covers[run[0]]]
            continue
        for value in run:
            out += [
                ((str(value), *rest), _numbered(axes, letter, value))
                for rest, axes in covers[value]
            ]
    return out


def _plain(cover: list[tuple[Suffix, Axes]]) -> list[tuple[Suffix, Axes]]:
    """Patterns and axes without the reasons why something is fixed."""
    return [(s, tuple(a.map(lambda f: replace(f, reason="")) for a in axes)) for s, axes in cover]


def _numbered(axes: Axes, letter: str, value: int) -> Axes:
    """The axes where a letter stands for a literal number."""
    return tuple(named(axis, lambda g: g.replace(f"{{{letter}}}", str(value))) for axis in axes)


def _groups(symmetry: Symmetry, names: Mapping[str, Called]) -> dict[str, GroupSpec]:
    out: dict[str, GroupSpec] = {}
    sizes: dict[str, set[int]] = defaultdict(set)
    for group in symmetry.groups.values():
        kind = names[group.name].pattern
        sizes[kind].add(group.size)
        per = tuple(names[p].pattern for p in group.per)
        stated = GroupSpec(kind, group.flags, None, per, group.output, group.reason)
        out[kind] = _common(out[kind], stated) if kind in out else stated
    return {
        kind: replace(stated, size=str(*sizes[kind])) if len(sizes[kind]) == 1 else stated
        for kind, stated in out.items()
    }


def _common(one: GroupSpec, other: GroupSpec) -> GroupSpec:
    """What both groups of a kind may do."""
    flags = "".join(f for f in one.flags if f in other.flags)
    per = tuple(p for p in one.per if p in other.per)
    output, reason = one.output or other.output, one.reason or other.reason
    return replace(one, flags=flags, per=per, output=output, reason=reason)
