"""From a trace to a symmetry: leaves become groups with flags, labels become axes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merge.symmetry.axes import Axis, Factor, Form
from merge.symmetry.symmetry import Group, Layout, Symmetry
from merge.tracing.atoms import Atom, Product, Reason, Ref, leaves, size_of
from merge.tracing.charges import Charges, solve_charges
from merge.tracing.dependence import parents_of
from merge.tracing.families import selector_of
from merge.tracing.labels import Label
from merge.tracing.refine import expanded
from merge.tracing.trace import Traced

__all__ = ["concrete"]


@dataclass(slots=True)
class _Naming:
    """Names and facts of the groups, by root."""

    names: dict[Atom, str]
    charges: Charges
    reasons: dict[str, str]
    words: dict[Reason, str]
    whole: dict[str, Group]  # groups that are frozen in all their parts

    def of(self, root: Atom) -> str:
        """The name of a root; a new one where it has none yet."""
        return self.names.setdefault(root, f"g{len(self.names)}")

    def frozen(self, ref: Ref) -> str:
        """The name of an atom that is frozen in all its parts."""
        name = self.of(ref.root)
        reasons = [r.root.reason for r in leaves([ref]) if r.root.reason]
        text = reasons[0].text if reasons else "taken apart by number"
        self.whole[name] = Group(name, ref.size, "", reason=text)
        return name


def concrete(traced: Traced) -> tuple[Symmetry, Symmetry]:
    """The symmetry of the traced module, and of its outputs; groups are called g0, g1 and so on.

    An axis that is frozen as a whole is fixed, with the reason as a word; what is frozen within an
    axis is a group without flags.
    """
    _collapse_hidden(traced)
    refs = _refs(traced.state)
    last = _refs(traced.outputs)
    charges = solve_charges(traced.book.equations, [*refs, *last])
    naming = _Naming({}, charges, {}, {}, {})
    tensors = {name: _layout(label, naming) for name, label in traced.state.items()}
    used = {g for layout in tensors.values() for g in layout.groups()}
    parents = parents_of(traced.book.labels, refs)
    above = {p for others in parents.values() for p in others}
    groups = dict(naming.whole)
    free = {r.root for r in last}
    listed = [r for r, n in naming.names.items() if n in used and n not in groups]
    for root in _parents_first(listed, parents):
        per = [naming.names[p] for p in parents.get(root, []) if naming.names.get(p) in used]
        group = _group(root, naming, per, root in free)
        groups[group.name] = replace(group, flags=group.flags[:1]) if root in above else group
    outputs = {name: _layout(label, naming) for name, label in traced.outputs.items()}
    found = Symmetry(groups, tensors, naming.reasons)
    return _upright(found), _upright(Symmetry(groups, outputs))


def _upright(symmetry: Symmetry) -> Symmetry:
    """Groups that are only permuted have one form."""
    plain = {n for n, g in symmetry.groups.items() if g.flags in ("", "P")}

    def form(factor: Factor) -> Factor:
        return replace(factor, form="") if factor.group in plain else factor

    tensors = {
        name: replace(layout, axes=tuple(axis.map(form) for axis in layout.axes))
        for name, layout in symmetry.tensors.items()
    }
    return replace(symmetry, tensors=tensors)


def _refs(labels: Mapping[str, Label]) -> list[Ref]:
    return [r for label in labels.values() for axis in label.axes for r in leaves(axis)]


def _layout(label: Label, naming: _Naming) -> Layout:
    axes = tuple(_axis(axis, naming) for axis in label.axes)
    return Layout(tuple(size_of(axis) for axis in label.axes), axes)


def _parents_first(roots: Sequence[Atom], parents: Mapping[Atom, Sequence[Atom]]) -> list[Atom]:
    return sorted(roots, key=lambda r: len(parents.get(r, ())))


def _group(root: Atom, naming: _Naming, per: list[str], output: bool) -> Group:
    name = naming.names[root]
    if root.reason is not None:
        return Group(name, root.size, "", (), False, root.reason.text)
    flags = "P" + "S" * (root in naming.charges.signs) + "D" * _scales(root, naming.charges)
    flags += "R" * (root.rotates and "S" in flags)
    return Group(name, root.size, flags, tuple(per), output)


def _scales(root: Atom, charges: Charges) -> bool:
    """Whether scales act, and on the same occurrences as signs where these act too."""
    scales, signs = charges.scales.get(root), charges.signs.get(root)
    if not scales or not signs:
        return bool(scales)
    return all(bool(scales[n]) == bool(signs[n]) for n in scales)


def _form(ref: Ref, naming: _Naming) -> Form:
    root, charges = ref.root, naming.charges
    if root in charges.scales and _scales(root, charges):
        charge = charges.scales[root][ref.number]
        return "*" if charge < 0 else "" if charge else "|"
    if root in charges.signs:
        return "" if charges.signs[root][ref.number] else "|"
    return ""


def _axis(product: Product, naming: _Naming) -> Axis:
    """An axis of a parameter as sums of products."""
    if all(r.root.frozen for r in leaves(product)):
        reason = next((r.root.reason for r in leaves(product)), None)
        word = "" if reason is None else _word(reason, naming)
        return Axis(((Factor(None, size_of(product), "", word),),))
    return _sum_of(product, naming)


def _word(reason: Reason, naming: _Naming) -> str:
    """The word of a reason; another one where it already stands for another text."""
    if reason not in naming.words:
        word, count = reason.word, 1
        while word in naming.reasons:
            count += 1
            word = f"{reason.word}_{'abcdefghijklmnopqrstuvwxyz'[count - 1]}"
        naming.words[reason] = word
        naming.reasons[word] = reason.text
    return naming.words[reason]


def _sum_of(product: Product, naming: _Naming) -> Axis:
    factors = _factors(expanded(product), naming)
    if len(factors) == 1 and isinstance(factors[0], Axis):
        return factors[0]
    return Axis((tuple(factors),))


def _flat(parts: Sequence[tuple[Factor | Axis, ...]]) -> Axis:
    """A sum; parts that are sums themselves are taken apart."""
    out: list[tuple[Factor | Axis, ...]] = []
    for part in parts:
        inner = part[0] if len(part) == 1 else None
        out += inner.parts if isinstance(inner, Axis) else [part]
    return Axis(tuple(out))


def _factors(refs: Sequence[Ref], naming: _Naming) -> list[Factor | Axis]:
    out: list[Factor | Axis] = []
    rest = deque(refs)
    while rest:
        ref = rest.popleft()
        root = ref.root
        if root.kind == "sum":
            if any(r.root.kind == "family" for r in rest):
                return [*out, _distributed(ref, list(rest), naming)]
            if all(leaf.root.frozen for leaf in leaves([ref])):
                out.append(Factor(naming.frozen(ref), ref.size))
                continue
            parts = [_part(p, naming) for p in ref.parts()]
            out.append(_flat(parts))
        else:
            out.append(Factor(naming.of(root), root.size, _form(ref, naming)))
    return out


def _part(product: Product, naming: _Naming) -> tuple[Factor | Axis, ...]:
    if not product:
        return (Factor(None, 1),)
    return tuple(_factors(expanded(product), naming))


def _distributed(ref: Ref, rest: list[Ref], naming: _Naming) -> Axis:
    """A sum before families over it: in each part the members that go with it."""
    parts = [_part(p, naming) for p in _members(ref, rest)]
    return _flat(parts)


def _members(ref: Ref, rest: Sequence[Ref]) -> list[Product]:
    """For each part of a sum the part and what stands behind it, members instead of families."""
    out: list[Product] = []
    for number, part in enumerate(ref.parts()):
        behind: list[Ref] = []
        for other in rest:
            own = other.root.kind == "family" and selector_of(other.root) is ref.root
            behind += other.parts()[number] if own else [other]
        out.append((*part, *behind))
    return out


def _collapse_hidden(traced: Traced) -> None:
    """Collapse families whose selector does not stand before them on the same axis."""
    axes = [axis for label in traced.state.values() for axis in label.axes]
    while hidden := next((root for axis in axes for root in _hidden(axis)), None):
        traced.book.collapse(hidden)


def _hidden(product: Sequence[Ref]) -> Iterator[Atom]:
    """The families that are not told apart by a sum before them."""
    rest = deque(expanded(product))
    while rest:
        ref = rest.popleft()
        if ref.root.kind == "family":
            yield ref.root
        elif ref.root.kind == "sum" and any(r.root.kind == "family" for r in rest):
            for part in _members(ref, list(rest)):
                yield from _hidden(part)
            return
        elif ref.root.kind == "sum":
            for part in ref.parts():
                yield from _hidden(part)
