"""Which numbers stand behind which tensor: blocks, ties between them, and what does not move.

The coefficients of tensor n are ``c[n] = link(sum_j w_nj z_j)``: rows z_j of latent numbers, tied
by the sparse weights w. Tensor by tensor each has a row of its own with weight 1; layer by layer
the tensors of a layer share one; smooth over depth, a layer mixes the two nearest knots.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from merge.errors import RecipeError, nearest
from merge.learning.coefficients import BASE, Kind

__all__ = ["GRANULARITIES", "LINKS", "Layout", "Link", "Unit", "layout_of"]

GRANULARITIES = (
    "scalar",
    "task",
    "group",
    "layer",
    "tensor",
    "row",
    "partition",
    "singular",
    "singular+row",
)
"""What has coefficients of its own; ``partition`` is followed by its parts: ``partition:8``.

``singular+row``: each direction of what is split into some and, besides, each row of it, from 0 on;
each entry of a vector.
"""

LINKS = ("identity", "clamp", "sigmoid", "softmax", "abs")
"""From latent numbers to coefficients; ``softmax`` is over the experts, times a learned scale."""


@dataclass(frozen=True, slots=True)
class Link:
    """From latent numbers to coefficients.

    identity: c = z. clamp: c = z, and z is put back into [low, high] after each step. sigmoid: c =
    low + (high - low) / (1 + e^-z). softmax: c = s softmax over operands of z, s one number for
    all blocks. abs: c = |z|.
    """

    kind: str = "identity"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in LINKS:
            raise RecipeError(
                "there is no such link",
                key="link",
                found=self.kind,
                expected=f"one of {', '.join(LINKS)}",
                do=f"did you mean {near!r}?" if (near := nearest(self.kind, LINKS)) else None,
            )
        if not self.low < self.high:
            raise RecipeError(
                "the bounds of coefficients are not in order",
                key="bounds",
                found=[self.low, self.high],
                expected="[low, high] with low < high",
            )


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that must be updated together, since they share latent rows."""

    rows: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Latent rows and their widths; for each tensor its rows with weights, its kind, its block."""

    operands: tuple[str, ...]
    widths: Mapping[str, int]
    members: Mapping[str, tuple[tuple[str, float], ...]]
    kinds: Mapping[str, Kind]
    blocks: Mapping[str, str]
    link: Link
    shared: bool = False  # one number for all operands
    granularity: str = "tensor"
    gates: Mapping[str, int] = field(default_factory=dict)
    """Of latent rows whose first numbers are of directions: how many. The others start at 0."""

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(self.members)

    def width(self, tensor: str) -> int:
        """Numbers of a tensor for each operand."""
        return self.widths[self.members[tensor][0][0]]

    def gates_of(self, tensor: str) -> int | None:
        """How many of a tensor's numbers are of directions, where others follow them."""
        return self.gates.get(self.members[tensor][0][0])

    def units(self) -> tuple[Unit, ...]:
        """Tensors that share rows, together; a softmax's scale ties all of them."""
        if self.link.kind == "softmax":
            return (Unit(tuple(self.widths), self.tensors),)
        unit_of: dict[str, int] = {}
        found: dict[int, tuple[dict[str, None], list[str]]] = {}
        for tensor, rows in self.members.items():
            numbers = sorted({unit_of[r] for r, _ in rows if r in unit_of})
            into = numbers[0] if numbers else len(unit_of) + len(self.members)
            merged_rows, tensors = found.setdefault(into, ({}, []))
            for other in numbers[1:]:
                rows_of, tensors_of = found.pop(other)
                merged_rows |= rows_of
                tensors += tensors_of
            merged_rows |= dict.fromkeys(r for r, _ in rows)
            tensors.append(tensor)
            unit_of |= dict.fromkeys(merged_rows, into)
        order = {n: i for i, n in enumerate(self.members)}
        units = [
            Unit(tuple(rows), tuple(sorted(tensors, key=order.__getitem__)))
            for rows, tensors in found.values()
        ]
        return tuple(sorted(units, key=lambda u: order[u.tensors[0]]))


def layout_of(
    operands: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    granularity: str,
    link: Link,
    *,
    layer_of: Callable[[str], str | None] = lambda _: None,
    groups: Sequence[tuple[str, str]] = (),
    directions: Mapping[str, int] | None = None,
    knots: int | None = None,
    base: bool = False,
) -> Layout:
    """The layout of a granularity over tensors of these shapes.

    layer_of: the layer that a tensor is in, as text, or None. groups: pairs of a pattern that is
    searched in names and the block's name, in which ``{1}`` stands for the pattern's first group;
    the first that matches counts, and what matches none is a block of its own. directions: for
    tensors that a preparation splits into singular directions, how many. knots: layers share this
    many rows, each mixing the two nearest. base: the base has a coefficient too.
    """
    kind, parts = _granularity(granularity)
    if knots is not None and kind != "layer":
        raise RecipeError(
            "only coefficients of layers can be smooth over depth",
            key="depth_smooth",
            found=granularity,
            expected="granularity: layer",
        )
    if kind.startswith("singular") and not directions:
        raise RecipeError(
            "there are no singular directions to have coefficients",
            key="granularity",
            found=kind,
            do="prepare the differences by tsv, cart or svd; vectors and vocabularies have none",
        )
    if kind == "singular+row" and (link.kind != "identity" or base):
        raise RecipeError(
            "numbers of rows start at 0 and go both ways",
            key="learn_base" if base else "link",
            found=base or link.kind,
            expected="link: identity, and a base that has no coefficient",
            do="or take granularity: singular",
        )
    all_operands = (*operands, BASE) if base else tuple(operands)
    if kind == "scalar" and link.kind == "softmax":
        raise RecipeError(
            "one number for all experts leaves a softmax over them nothing to choose",
            key="link",
            found="softmax",
            do="take granularity: task",
        )
    widths: dict[str, int] = {}
    members: dict[str, tuple[tuple[str, float], ...]] = {}
    kinds: dict[str, Kind] = {}
    blocks: dict[str, str] = {}
    gates: dict[str, int] = {}
    for name, shape in shapes.items():
        block, what, width = _block(name, shape, kind, parts, layer_of, groups, directions or {})
        blocks[name], kinds[name] = block, what
        members[name] = ((block, 1.0),)
        widths[block] = width
        if what == "singular+row":
            gates[block] = (directions or {})[name]
    if knots is not None:
        members, widths = _smooth(blocks, layer_of, knots)
    shared = kind == "scalar"
    return Layout(all_operands, widths, members, kinds, blocks, link, shared, granularity, gates)


def _granularity(text: str) -> tuple[str, int]:
    kind, _, parts = text.partition(":")
    if kind not in GRANULARITIES:
        near = nearest(kind, GRANULARITIES)
        raise RecipeError(
            "there is no such granularity",
            key="granularity",
            found=text,
            expected=f"one of {', '.join(GRANULARITIES)}",
            do=f"did you mean {near!r}?" if near else None,
        )
    if (kind == "partition") != bool(parts) or (parts and not parts.isdecimal()) or parts == "0":
        raise RecipeError(
            "a partition is followed by the number of its parts, and nothing else is",
            key="granularity",
            found=text,
            expected="such as partition:8",
        )
    return kind, int(parts or 1)


def _block(
    name: str,
    shape: tuple[int, ...],
    kind: str,
    parts: int,
    layer_of: Callable[[str], str | None],
    groups: Sequence[tuple[str, str]],
    directions: Mapping[str, int],
) -> tuple[str, Kind, int]:
    """Name, kind and width of the block of a tensor."""
    if kind in ("scalar", "task"):
        return "all", "whole", 1
    if kind == "layer":
        return layer_of(name) or name.rpartition(".")[0] or name, "whole", 1
    if kind == "group":
        return _group(name, groups), "whole", 1
    if kind == "row" and len(shape) > 1:
        return name, "row", shape[0]
    if kind == "partition" and math.prod(shape) >= parts:
        return name, "partition", parts
    if kind == "singular" and name in directions:
        return name, "singular", directions[name]
    if kind == "singular+row" and name in directions:
        return name, "singular+row", directions[name] + shape[0]
    if kind == "singular+row" and len(shape) == 1:
        return name, "row", shape[0]
    return name, "whole", 1


def _group(name: str, groups: Sequence[tuple[str, str]]) -> str:
    for pattern, block in groups:
        if (found := re.search(pattern, name)) is not None:
            return block.format(found.group(0), *(g or "" for g in found.groups()))
    return name


def _smooth(
    blocks: Mapping[str, str], layer_of: Callable[[str], str | None], knots: int
) -> tuple[dict[str, tuple[tuple[str, float], ...]], dict[str, int]]:
    """Rows at evenly spaced depths, of which each layer mixes the two nearest."""
    if knots < 1:
        raise RecipeError("too few knots", key="depth_smooth", found=knots, expected="1 or more")
    layers = list(dict.fromkeys(b for n, b in blocks.items() if layer_of(n) is not None))
    members: dict[str, tuple[tuple[str, float], ...]] = {}
    widths: dict[str, int] = {}
    for name, block in blocks.items():
        if layer_of(name) is None:
            members[name] = ((block, 1.0),)
        else:
            at = layers.index(block) / max(1, len(layers) - 1) * (knots - 1)
            low = min(int(at), max(0, knots - 2))
            mixed = ((low, 1.0 - (at - low)), (low + 1, at - low))
            members[name] = tuple((f"knot {j}", w) for j, w in mixed if w > 0.0)
        widths |= {row: 1 for row, _ in members[name]}
    return members, widths
