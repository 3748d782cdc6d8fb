"""The residual stream of a decoder with RMSNorm, rotated: an exact symmetry once gains are folded.

A norm without gains does not see a rotation of the stream. So each gain is first multiplied into
the maps that read the normalised stream, where it stands for nothing else; then every writer and
reader of the stream may be rotated together; and at the end the gains of the network that is
aligned to are divided out again, so that both have one set of gains and can be averaged.

For decoders whose maps are named as in Llama, whose head is no copy of the embeddings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge.alignment.continuous import rotate
from merge.alignment.costs import terms_of
from merge.alignment.families import Tree
from merge.alignment.held import Reader
from merge.alignment.matching import Scores
from merge.alignment.report import Match, moved_share
from merge.alignment.solvers import procrustes
from merge.alignment.weight import match_weights
from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import Whole
from merge.ir.expr import Expr
from merge.symmetry.action import apply
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Folded", "folded", "gains_of", "match_stream", "unfolded"]

_READERS = {
    r"(.*layers\.\d+\.)self_attn\.[qkv]_proj\.weight": "input_layernorm.weight",
    r"(.*layers\.\d+\.)mlp\.(?:gate|up)_proj\.weight": "post_attention_layernorm.weight",
    r"(.*?)lm_head\.weight": "model.norm.weight",
}
"""Which maps read which norm."""

_ROUNDS = 12  # of turns between the stream and all else
_GAIN = 1e-9  # relative: a round that gains less is the last


def gains_of(symmetry: Symmetry, tied: Collection[str] = ()) -> dict[str, str]:
    """For each map that reads the normalised stream the tensor of the gains before it.

    tied: names of tensors that are others', too.

    PlanError where the network is not of the kind whose stream may be rotated.
    """
    found: dict[str, str] = {}
    for name in symmetry.tensors:
        for pattern, norm in _READERS.items():
            if match := re.fullmatch(pattern, name):
                found[name] = match[1] + norm
    norms = {n for n in symmetry.tensors if n.endswith("norm.weight") and "self_attn" not in n}
    biased = [n for n in symmetry.tensors if n.endswith("norm.bias")]
    shared = [n for n in found if n in tied]
    if shared or "lm_head.weight" not in found or norms != set(found.values()) or biased:
        odd = sorted(norms ^ set(found.values())) or biased or shared or ["lm_head.weight"]
        raise PlanError(
            "the residual stream of this network cannot be rotated",
            tensor=odd[0],
            found="no such tensor"
            if odd[0] not in symmetry.tensors
            else "it is tied"
            if shared
            else "a norm of another kind",
            expected="a decoder with RMSNorm before attention and MLP, named as in Llama, whose"
            " lm_head has weights of its own",
            do="leave 'stream' out of rotate",
        )
    return found


class Folded:
    """A network's tensors with the gains in their readers, and ones in their place."""

    def __init__(self, reader: Reader, gains: Mapping[str, str]) -> None:
        self._reader, self._gains = reader, gains
        self._norms = set(gains.values())

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """The tensor, or some of its rows."""
        found = self._reader.read(name, first, last)
        wide = found.double() if found.element_size() > 4 else found.float()
        if name in self._norms:
            return wide.new_ones(wide.shape)
        gain = self._gains.get(name)
        return wide if gain is None else wide * self._reader.read(gain).to(wide.dtype)


class _Moved:
    """A reader whose tensors are moved by part of an element already."""

    def __init__(self, reader: Reader, symmetry: Symmetry, moves: Mapping[str, Any]) -> None:
        self._reader, self._symmetry, self._moves = reader, symmetry, moves

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        layout = self._symmetry.tensors[name]
        found = _moved(self._symmetry, name, self._reader.read(name), self._moves)
        return found if last is None or not layout.shape else found[first:last]


def _moved(symmetry: Symmetry, name: str, value: Tensor, moves: Mapping[str, Any]) -> Tensor:
    layout = symmetry.tensors[name]
    mine = {g: m for g, m in moves.items() if g in layout.groups()}
    found: Tensor = apply(Symmetry(symmetry.groups, {name: layout}), {name: value}, mine)[name]
    return found


def _without(symmetry: Symmetry, gains: Mapping[str, str]) -> Symmetry:
    """The symmetry of the folded network: its norms have nothing left to move."""
    norms = set(gains.values())
    return replace(symmetry, tensors={n: x for n, x in symmetry.tensors.items() if n not in norms})


def folded(checkpoint: Checkpoint, gains: Mapping[str, str]) -> Checkpoint:
    """A checkpoint without its norms, their gains in the maps that read them."""
    norms = set(gains.values())
    tensors: dict[str, Expr] = {}
    for name, expr in checkpoint.tensors.items():
        if name in norms:
            continue
        gain = gains.get(name)
        tensors[name] = expr if gain is None else _times(expr, checkpoint.tensors[gain])
    return replace(checkpoint, tensors=tensors)


def unfolded(
    checkpoint: Checkpoint, of: Checkpoint, gains: Mapping[str, str], names: Iterable[str]
) -> Checkpoint:
    """A folded checkpoint with the gains ``of`` another, divided out of the maps that read them.

    names: of all tensors, in order.
    """
    tensors: dict[str, Expr] = {}
    for name in names:
        gain = gains.get(name)
        if name not in checkpoint.tensors:
            tensors[name] = of.tensors[name]
        elif gain is None:
            tensors[name] = checkpoint.tensors[name]
        else:
            tensors[name] = _times(checkpoint.tensors[name], of.tensors[gain], inverse=True)
    return replace(checkpoint, tensors=tensors)


def _times(expr: Expr, gain: Expr, *, inverse: bool = False) -> Expr:
    function = _divided if inverse else _multiplied
    size = math.prod(expr.shape)
    name = "divided by gains" if inverse else "times gains"
    return Whole(name, function, (expr, gain), (), expr.shape, expr.dtype, scratch=size)


def _multiplied(weight: Tensor, gain: Tensor) -> Tensor:
    return weight * gain


def _divided(weight: Tensor, gain: Tensor) -> Tensor:
    return weight / gain


def match_stream(
    symmetry: Symmetry,
    a: Reader,
    b: Reader,
    match: Match,
    kinds: Collection[str] = (),
    *,
    names: Collection[str] | None = None,
    keep: Collection[str] = (),
) -> tuple[Symmetry, Match]:
    """The best rotation of B's stream with the best of all else, of the folded networks.

    match: by permutations, where it begins. kinds: what else may be rotated. names: tensors to go
    by. The stream is the group that the head reads. In turns the stream is rotated, what is in
    heads is, and all else is matched, each exactly.
    """
    gains = gains_of(symmetry)
    inside = _without(symmetry, gains)
    group = inside.tensors["lm_head.weight"].groups()[-1]
    one, two = Folded(a, gains), Folded(b, gains)
    chosen = [n for n in inside.tensors if names is None or n in names]
    element = dict(match.element)
    best = 0.0
    notes: tuple[str, ...] = ()
    for _ in range(_ROUNDS):
        element[group], value = _stream(inside, one, two, group, element, chosen)
        if value <= best + _GAIN * abs(best):
            break
        best = value
        fixed = {g: m for g, m in element.items() if g in _with_matrices(inside, element)}
        free = [g for g in element if g not in fixed]
        if free:
            found = match_weights(
                inside,
                one,
                _Moved(two, inside, fixed),
                names=chosen,
                keep=[*keep, *fixed],
                start={g: element[g] for g in free},
            )
            element |= found.element
        if kinds:
            inside, turned = rotate(inside, one, two, replace(match, element=element), kinds)
            element, notes = dict(turned.element), turned.report.notes[-1:]
    moved, shares = moved_share(inside, element)
    groups = tuple(replace(g, moved=shares.get(g.group, g.moved)) for g in match.report.groups)
    notes = (f"the stream {group} is rotated, gains are folded on the way", *notes)
    report = replace(match.report, moved=moved, groups=groups, notes=(*match.report.notes, *notes))
    return inside, Match(element, report)


def _stream(
    symmetry: Symmetry,
    one: Reader,
    two: Reader,
    group: str,
    element: Mapping[str, Any],
    names: Iterable[str],
) -> tuple[Any, float]:
    """The best rotation of the stream, all else as it is, and what it is worth."""
    tree = Tree(group, symmetry.groups[group].size, False, (), "orthogonal")
    scores = Scores.of(tree, signed=False)
    others = {g: m for g, m in element.items() if g != group}
    for name in names:
        layout = symmetry.tensors[name]
        if group in layout.groups():
            second = _moved(symmetry, name, two.read(name), others)
            scores.add(list(terms_of(layout, one.read(name), second, tree, element)))
    return procrustes(scores.plain)


def _with_matrices(symmetry: Symmetry, element: Mapping[str, Any]) -> set[str]:
    """The groups that are moved by matrices, and those that belong with them."""
    turned = {g for g, m in element.items() if getattr(m, "dtype", None) is not None
              and m.dtype.kind == "f"}  # fmt: skip
    parents = {p for g in turned for p in symmetry.groups[g].per}
    beside = {g for g in element if parents & {*symmetry.groups[g].per}}
    return turned | parents | beside
