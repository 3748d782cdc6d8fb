"""Names for derived groups: what they are in the network, and which layer they are of.

A group's *kind* is its name without layer numbers, such as ``kv`` or ``f``; its numbers are those
in the part of the path that all of its tensors share: ``f3`` is in ``model.layers.3.mlp`` only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from merge.symmetry.axes import Axis, Factor, named
from merge.symmetry.symmetry import Layout, Symmetry
from merge.tracing.stacks import Stacks

__all__ = ["Called", "called", "renamed"]

_ATTENTION = re.compile(r"att|qkv|(^|\.)(q|k|v|o)(_proj|_lin)?(\.|$)")
_EXPERTS = re.compile(r"expert|router|(moe|mlp|ffn|feed_forward)\.gate\.")
_ROUTER = re.compile(r"(^|\.)(gate|router|wg|classifier|layer)\.(weight|bias)$|e_score")
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|intermediate|(^|\.)fc|dense|\.wi_?\d?\.|(^|\.)lin\d", re.I
)
_QUERIES = re.compile(r"(^|[._])(q|k|query|key)(_proj|_lin|_norm|_layernorm|\d)?\.")
_COMMON = {"model", "layers", "layer", "blocks", "block", "h", "transformer", "module"}


@dataclass(frozen=True, slots=True)
class Called:
    """The kind of a group and the numbers of the layer that it is in, with their letters."""

    kind: str
    numbers: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kind with its numbers: ``f3``, ``f3_1``."""
        return self._with(str(n) for _, n in self.numbers)

    @property
    def pattern(self) -> str:
        """The kind with letters in place of numbers: ``f{i}``, ``f{i}_{j}``."""
        return self._with(f"{{{letter}}}" for letter, _ in self.numbers)

    def _with(self, numbers: Iterable[str]) -> str:
        text = "_".join(numbers)
        return f"{self.kind}_{text}" if text and self.kind[-1].isdigit() else f"{self.kind}{text}"


def called(symmetry: Symmetry) -> dict[str, Called]:
    """What each group is called; no two groups are called alike."""
    stacks = Stacks.of(symmetry.tensors)
    places: dict[str, list[str]] = defaultdict(list)
    for tensor, layout in symmetry.tensors.items():
        for group in layout.groups():
            places[group].append(tensor)
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for group in symmetry.groups:
        path = _shared(places[group])
        kinds[_role(symmetry, group, places[group], stacks)][stacks.loose(path)].append(group)
    out: dict[str, Called] = {}
    taken: dict[str, str] = {}  # kinds, and of which path
    for role, paths in kinds.items():
        for path, suffix in _suffixes(list(paths)).items():
            alike: dict[tuple[tuple[str, int], ...], list[str]] = defaultdict(list)
            for group in paths[path]:
                alike[stacks.numbers(_shared(places[group]))].append(group)
            for numbers, groups in alike.items():
                count = iter(range(len(groups) + len(taken) + 2))
                for group in groups:
                    kind = "_".join(w for w in (role, suffix) if w)
                    while len(groups) > 1 or taken.get(kind, path) != path:
                        kind = "_".join(w for w in (role, suffix, _letter(next(count))) if w)
                        if taken.get(kind, path) == path:
                            break
                    taken[kind] = path
                    out[group] = Called(kind, numbers)
    return out


def _letter(count: int) -> str:
    """a, b, ..., z, then aa, ab and so on."""
    text = chr(ord("a") + count % 26)
    return text if count < 26 else _letter(count // 26 - 1) + text


def renamed(symmetry: Symmetry, names: Mapping[str, str]) -> Symmetry:
    """The same symmetry with its groups called otherwise."""

    def layout(old: Layout) -> Layout:
        axes = tuple(named(a, lambda g: names[g]) for a in old.axes)
        return replace(old, axes=axes, stack=names.get(old.stack, ""))

    groups = {
        names[g.name]: replace(g, name=names[g.name], per=tuple(names[p] for p in g.per))
        for g in symmetry.groups.values()
    }
    tensors = {name: layout(old) for name, old in symmetry.tensors.items()}
    return replace(symmetry, groups=groups, tensors=tensors)


def _shared(tensors: Sequence[str]) -> str:
    """The path that all names begin with, in whole components.

    >>> _shared(["h.3.mlp.up.weight", "h.3.mlp.down.weight"])
    'h.3.mlp'
    """
    split = [name.split(".")[:-1] for name in tensors]
    common = []
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _role(symmetry: Symmetry, group: str, tensors: Sequence[str], stacks: Stacks) -> str:
    """One of kv, slot, h, qk, v, e, f, d, c: by where the group stands and beside what."""
    children = [g.name for g in symmetry.groups.values() if group in g.per]
    if all(_ATTENTION.search(t) for t in tensors):
        return _attention_role(symmetry, group, tensors, children)
    if all(_EXPERTS.search(t) for t in tensors):
        return "e" if children or any(_ROUTER.search(t) for t in tensors) else "f"
    if len({stacks.numbers(t)[:1] for t in tensors}) > 1:
        return "d"
    return "f" if all(_MLP.search(t) for t in tensors) else "c"


def _attention_role(
    symmetry: Symmetry, group: str, tensors: Sequence[str], children: Sequence[str]
) -> str:
    if children:
        return "kv" if any(not _inner(symmetry, g) for g in children) else "h"
    if not _inner(symmetry, group):
        return "slot" if symmetry.groups[group].per else "h"
    fused = all(
        any(len(a.parts) > 1 or _nested(a) for a in symmetry.tensors[t].axes) for t in tensors
    )
    return "qk" if fused or all(_QUERIES.search(t) for t in tensors) else "v"


def _nested(axis: Axis) -> bool:
    return any(isinstance(f, Axis) for product in axis.parts for f in product)


def _inner(symmetry: Symmetry, group: str) -> bool:
    """Whether the group is the inner factor of some axis."""

    def last(axis: Axis) -> Iterable[Factor]:
        for product in axis.parts:
            end = product[-1]
            yield from last(end) if isinstance(end, Axis) else [end]

    axes = (a for layout in symmetry.tensors.values() for a in layout.axes)
    return any(f.group == group for axis in axes for f in last(axis))


def _suffixes(paths: Sequence[str]) -> dict[str, str]:
    """A word for each path that tells it from the others; '' where there is one path only.

    >>> _suffixes(["encoder.#.attn", "decoder.#.attn"])
    {'encoder.#.attn': 'encoder', 'decoder.#.attn': 'decoder'}
    """
    if len(paths) == 1:
        return {paths[0]: ""}
    words = {p: [w for w in p.split(".") if not w.isdigit() and w != "#"] for p in paths}
    common = set.intersection(*(set(w) for w in words.values())) | _COMMON
    own = {p: [w for w in words[p] if w not in common] for p in paths}
    out: dict[str, str] = {}
    for path in paths:
        others = {w for p in paths if p != path for w in own[p]}
        single = next((w for w in own[path] if w not in others), None)
        word = single or "_".join(own[path])
        text, count = word, 0
        while text in out.values():
            count += 1
            text = f"{word}_{_letter(count)}".lstrip("_")
        out[path] = text
    return out
