"""From a spec to the symmetry of one checkpoint: names matched, sizes told, shapes checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merge.errors import PlanError
from merge.symmetry.axes import Axis, Factor, factors_of, named
from merge.symmetry.patterns import Finder, Match, Pattern, fill
from merge.symmetry.sizes import evaluate
from merge.symmetry.spec import GroupSpec, Spec
from merge.symmetry.symmetry import Group, Layout, Symmetry, blocks

__all__ = ["resolve"]

Sizes = dict[str, int]


def resolve(
    spec: Spec,
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, object] | None = None,
) -> Symmetry:
    """The symmetry of the checkpoint with tensors of ``shapes``.

    Sizes of groups come from ``config`` by the spec's expressions, and where there is none from the
    shapes. `PlanError` where a tensor matches no pattern or several, where a size cannot be told or
    does not fit; it names the tensor, the axis, what was found and what was expected.
    """
    layouts = _matched(spec, shapes)
    groups = _Groups(spec, config or {})
    for layout in layouts.values():
        for name in layout.groups():
            groups.add(name)
    sizes = groups.sizes
    layouts = _stacked(layouts, sizes)
    _solve(layouts, sizes)
    resolved = {name: _sized(name, layout, sizes, spec) for name, layout in layouts.items()}
    concrete = {n: replace(g, size=sizes[n]) for n, g in groups.found.items()}
    for name, layout in resolved.items():
        _check_parents(name, layout, concrete)
    return Symmetry(concrete, resolved, dict(spec.frozen), spec.notes)


def _matched(spec: Spec, shapes: Mapping[str, Sequence[int]]) -> dict[str, Layout]:
    patterns = {p: Pattern.of(p) for p in spec.tensors}
    find = Finder(patterns.values())
    layouts: dict[str, Layout] = {}
    for name, shape in shapes.items():
        found = find(name)
        if len(found) != 1:
            raise _unmatched(name, [p.text for p, _ in found], spec)
        (pattern, match) = found[0]
        axes = spec.tensors[pattern.text]
        if len(axes) != len(shape):
            raise PlanError(
                "a tensor has another number of axes than the symmetry spec says",
                tensor=name,
                found=f"shape {list(shape)}",
                expected=f"{len(axes)} axes: {', '.join(map(str, axes)) or 'none'}",
                do="check that the spec is of this architecture",
            )
        layouts[name] = _layout(tuple(shape), axes, pattern, match)
    return layouts


def _layout(
    shape: tuple[int, ...], axes: tuple[Axis, ...], pattern: Pattern, match: Match
) -> Layout:
    concrete = tuple(named(axis, lambda g: fill(g, match.numbers)) for axis in axes)
    return Layout(shape, concrete, pattern.text, match.stack, match.member)


def _unmatched(name: str, patterns: list[str], spec: Spec) -> PlanError:
    if patterns:
        what, found = "several patterns of the symmetry spec match a tensor", ", ".join(patterns)
        do = "make the patterns exclude each other, for example by {i>0}"
    else:
        near = difflib.get_close_matches(name, spec.tensors, n=1, cutoff=0.6)
        what, found = "no pattern of the symmetry spec matches a tensor", "none"
        do = "check that the spec is of this architecture, or add the tensor to it"
        do += f"; the nearest pattern is {near[0]}" if near else ""
    return PlanError(what, tensor=name, found=found, expected="exactly one pattern", do=do)


@dataclass(slots=True)
class _Groups:
    """The concrete groups found so far; sizes of those that the config tells."""

    spec: Spec
    config: Mapping[str, object]
    found: dict[str, Group]
    sizes: Sizes
    find: Finder

    def __init__(self, spec: Spec, config: Mapping[str, object]) -> None:
        self.spec, self.config, self.found, self.sizes = spec, config, {}, {}
        self.find = Finder(Pattern.of(name) for name in spec.groups)

    def add(self, name: str) -> None:
        """Add a group by its concrete name, and its parents before it."""
        if name in self.found:
            return
        found = self.find(name)
        if len(found) != 1:
            raise PlanError(
                "the name of a group means several groups of the symmetry spec"
                if found
                else "a group is not in the symmetry spec",
                group=name,
                found=", ".join(p.text for p, _ in found) or "none",
                expected="exactly one",
            )
        pattern, match = found[0]
        stated: GroupSpec = self.spec.groups[pattern.text]
        parents = tuple(fill(p, match.numbers) for p in stated.per)
        for parent in parents:
            self.add(parent)
        self.found[name] = Group(name, 0, stated.flags, parents, stated.output, stated.reason)
        size = stated.size and evaluate(stated.size, self.config, match.numbers)
        if size:
            self.sizes[name] = size


def _stacked(layouts: dict[str, Layout], sizes: Sizes) -> dict[str, Layout]:
    """Tensors that are slices of one stacked tensor are told each other's names."""
    families: dict[tuple[str, str, tuple[Axis, ...]], dict[int, str]] = {}
    for name, layout in layouts.items():
        if layout.stack:
            key = (layout.pattern, layout.stack, layout.axes)
            families.setdefault(key, {})[layout.member] = name
    out = dict(layouts)
    for (pattern, stack, _), members in families.items():
        wanted = sizes.setdefault(stack, len(members))
        if sorted(members) != list(range(wanted)):
            raise PlanError(
                "tensors that belong together are not all there",
                pattern=pattern,
                group=stack,
                found=f"numbers {', '.join(map(str, sorted(members)))}",
                expected=f"0 to {wanted - 1}",
            )
        siblings = tuple(members[i] for i in range(wanted))
        for name in siblings:
            out[name] = replace(layouts[name], siblings=siblings)
    return out


def _solve(layouts: Mapping[str, Layout], sizes: Sizes) -> None:
    """Fill in sizes that follow from a shape: those of axes with a single unknown group."""
    waiting = [(n, k) for n, layout in layouts.items() for k in range(len(layout.axes))]
    while True:
        rest = []
        for name, k in waiting:
            axis, length = layouts[name].axes[k], layouts[name].shape[k]
            constant, unknown = _linear(axis, sizes)
            if len(unknown) != 1 or None in unknown:
                rest.append((name, k))
                continue
            ((group, factor),) = unknown.items()
            if factor and (length - constant) % factor == 0 and length > constant:
                sizes[str(group)] = (length - constant) // factor
        if len(rest) == len(waiting):
            break
        waiting = rest
    for name, k in waiting:
        _, unknown = _linear(layouts[name].axes[k], sizes)
        if open_groups := [str(g) for g in unknown if g is not None]:
            raise PlanError(
                "the size of a group cannot be told from the config or from the shapes",
                tensor=name,
                axis=f"{k} ({layouts[name].axes[k]})",
                group=open_groups[0],
                found=f"length {layouts[name].shape[k]}",
                expected=f"a size of {', '.join(open_groups)}",
                do="give the checkpoint's config.json, or state the size in the spec",
            )


def _linear(axis: Axis, sizes: Sizes) -> tuple[int, dict[str | None, int]]:
    """The length of an axis: a constant, and a factor for each unknown group (None: a fixed one).

    The factor is 0 where a product has several unknowns.
    """
    total, unknown = 0, dict[str | None, int]()
    for product in axis.parts:
        constant, here = 1, dict[str | None, int]()
        for factor in product:
            if isinstance(factor, Axis):
                length, inner = _linear(factor, sizes)
            else:
                length = factor.size or sizes.get(factor.group or "", 0)
                inner = {} if length else {factor.group: 1}
            both = bool(here) and bool(inner)
            grown = {g: 0 if both else n * length for g, n in here.items()}
            grown |= {g: 0 if both else n * constant for g, n in inner.items()}
            constant, here = constant * length, grown
        total += constant
        for group, n in here.items():
            unknown[group] = unknown.get(group, 0) + n
    return total, unknown


def _sized(name: str, layout: Layout, sizes: Sizes, spec: Spec) -> Layout:
    axes = []
    for k, (axis, length) in enumerate(zip(layout.axes, layout.shape, strict=True)):
        constant, unknown = _linear(axis, sizes)
        left, odd = divmod(length - constant, unknown.get(None, 1) or 1)
        open_parts = sum(f.group is None and not f.size for f in factors_of(axis))
        if odd or (left < 1 if open_parts else left != 0) or open_parts > 1:
            raise PlanError(
                "an axis has another length than the symmetry spec says",
                tensor=name,
                axis=f"{k} ({axis})",
                found=length,
                expected=_expected(axis, sizes),
                do="check that the spec and config.json are of this checkpoint",
            )

        def sized(factor: Factor, left: int = left) -> Factor:
            return replace(factor, size=factor.size or sizes.get(factor.group or "", 0) or left)

        axes.append(axis.map(sized))
    return replace(layout, axes=tuple(axes))


def _expected(axis: Axis, sizes: Sizes) -> str:
    told = {str(f): f.size or sizes.get(f.group or "") for f in factors_of(axis)}
    listed = ", ".join(f"{f} = {n}" for f, n in told.items() if n)
    constant, unknown = _linear(axis, sizes)
    whole = str(constant) if None not in unknown else f"a multiple of {unknown[None]}"
    whole = f"{constant} and {whole}" if None in unknown and constant else whole
    return f"{whole} ({listed})" if listed else whole


def _check_parents(name: str, layout: Layout, groups: Mapping[str, Group]) -> None:
    """A group that depends on others has each of them exactly once beside it."""
    for block in blocks(layout.axes):
        here = [f.group for f in block] + [layout.stack]
        for factor in block:
            for parent in groups[factor.group].per if factor.group else ():
                if here.count(parent) != 1:
                    raise PlanError(
                        "a group stands without the group that it depends on",
                        tensor=name,
                        group=factor.group,
                        found=f"{parent} {here.count(parent)} times beside it",
                        expected="once",
                        do=f"take {parent} out of its 'per', or name the axis with it",
                    )
