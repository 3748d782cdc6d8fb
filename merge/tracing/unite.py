"""Specs of classes that share a body, such as a model and its heads, brought into one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from merge.symmetry.axes import Axis, Factor, factors_of, named
from merge.symmetry.patterns import slots
from merge.symmetry.spec import FLAGS, GroupSpec, Spec

__all__ = ["optional_prefix", "united"]


def united(one: Spec, other: Spec, *, alike: bool = False) -> Spec | None:
    """One spec with the patterns of both; None where they contradict each other.

    Groups of ``other`` are called as in ``one`` where they share a pattern, or are those of the
    same name where both are named ``alike``. What a group may do is what it may do in both.
    """
    names = _matched(one, other)
    if names is None:
        return None
    if alike:
        names = {name: name for name in other.groups}
    taken = set(one.groups)
    for name in other.groups:
        if name not in names:
            names[name] = _free(name, taken)
            taken.add(names[name])
    groups = dict(one.groups)
    for name, group in other.groups.items():
        own = replace(group, name=names[name], per=tuple(names[p] for p in group.per))
        groups[own.name] = _common(groups[own.name], own) if own.name in groups else own
    tensors = {
        pattern: tuple(named(a, lambda g: _renamed(g, names)) for a in axes)
        for pattern, axes in other.tensors.items()
    }
    tensors = {**tensors, **one.tensors}
    ordered = {p: tensors[p] for p in dict.fromkeys([*one.tensors, *tensors])}
    for pattern in list(ordered):  # a name with an optional prefix stands for that without it too
        bare = re.sub(r"^\[[^]]*\]", "", pattern)
        if bare != pattern and str(ordered.get(bare)) == str(ordered[pattern]):
            del ordered[bare]
    notes = tuple(dict.fromkeys([*one.notes, *other.notes]))
    frozen = {**other.frozen, **one.frozen}
    return _upright(Spec(one.model, groups, ordered, frozen, notes))


def _matched(one: Spec, other: Spec) -> dict[str, str] | None:
    """What groups of ``other`` are called in ``one``; None where a pattern's axes differ."""
    names: dict[str, str] = {}
    for pattern, axes in other.tensors.items():
        if pattern not in one.tensors:
            continue
        ours = one.tensors[pattern]
        if len(ours) != len(axes):
            return None
        for left, right in zip(ours, axes, strict=True):
            if _shape(left) != _shape(right):
                return None
            for a, b in zip(factors_of(left), factors_of(right), strict=True):
                if a.group is not None and b.group is not None:
                    mine, theirs = _stated(a.group, one), _stated(b.group, other)
                    if names.setdefault(theirs, mine) != mine:
                        return None
    return names if len(set(names.values())) == len(names) else None


def _stated(name: str, spec: Spec) -> str:
    """The group as the spec states it: ``c{i}`` for ``c0``."""
    return name if name in spec.groups else next(g for g in spec.groups if slots(g, name))


def _renamed(name: str, names: Mapping[str, str]) -> str:
    if name in names:
        return names[name]
    for old, new in names.items():
        for letter, text in (slots(old, name) or {}).items():
            new = new.replace(f"{{{letter}}}", text)
        if slots(old, name):
            return new
    return name


def _shape(axis: Axis) -> object:
    """An axis without names, sizes and forms."""
    return tuple(
        tuple(_shape(f) if isinstance(f, Axis) else f.group is None for f in product)
        for product in axis.parts
    )


def _free(name: str, taken: set[str]) -> str:
    """The name, or one like it that is not taken."""
    kind, brace, numbers = name.partition("{")
    letters: Iterator[str] = iter("bcdefghijklmnopqrstuvwxyz")
    new = name
    while new in taken:
        new = f"{kind}_{next(letters)}{brace}{numbers}"
    return new


def _common(one: GroupSpec, other: GroupSpec) -> GroupSpec:
    flags = "".join(f for f in FLAGS if f in one.flags and f in other.flags)
    per = tuple(p for p in one.per if p in other.per)
    size = one.size if one.size == other.size else one.size or other.size
    output, reason = one.output or other.output, one.reason or other.reason
    return replace(one, flags=flags, per=per, size=size, output=output, reason=reason)


def _upright(spec: Spec) -> Spec:
    """Groups that are only permuted have one form."""
    plain = {n for n, g in spec.groups.items() if g.flags in ("", "P")}

    def form(factor: Factor) -> Factor:
        fixed = factor.group is None or _stated(factor.group, spec) not in plain
        return factor if fixed else replace(factor, form="")

    tensors = {p: tuple(a.map(form) for a in axes) for p, axes in spec.tensors.items()}
    return replace(spec, tensors=tensors)


def optional_prefix(spec: Spec, prefix: str, headed: bool) -> Spec:
    """The spec for names with and without the prefix that a body has in a model with a head.

    In a headed model the names of the body have it, in the body alone none does.
    """
    if not prefix:
        return spec

    def pattern(text: str) -> str:
        if not headed:
            return f"[{prefix}.]{text}"
        rest = text.removeprefix(f"{prefix}.")
        return text if rest == text else f"[{prefix}.]{rest}"

    return replace(spec, tensors={pattern(p): axes for p, axes in spec.tensors.items()})
