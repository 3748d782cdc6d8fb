"""A checkpoint with as many layers as another: blocks that do nothing put in, layers taken out.

In a residual network a block does nothing when what it writes to the stream is zero: its last
projections, or the gain and bias of a batch norm that ends a branch. In a chain of linear maps
with ReLU between them, the identity does nothing to what ReLU gave. Where a norm follows the
addition, as in BERT, no block does nothing.

A layer is taken out of a residual network by leaving it out; out of a chain by composing its map
with the next, ``ReLU(z)`` taken for ``D z`` with D the share of samples in which z is positive.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import Whole
from merge.ir.expr import Expr, linear_sum
from merge.symmetry.axes import factors_of
from merge.symmetry.symmetry import Symmetry
from merge.transport.coupling import Roles

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Stack", "Stream", "stacks_of", "stream_of", "with_layers"]

_NUMBER = re.compile(r"(?<![^.])(\d+)(?![^.])")

_PRE_NORM = {
    "clip", "clip_text_model", "clip_vision_model", "cohere", "deit", "dinov2", "falcon", "gemma",
    "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral",
    "mixtral", "olmo", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "siglip", "stablelm",
    "starcoder2", "t5", "vit", "whisper",
}  # fmt: skip
"""Model types whose branches are added to the stream as they are, with no norm after that."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers that follow one another. prefix: what stands before their numbers, with its dot."""

    prefix: str
    numbers: tuple[int, ...]

    def name(self, number: int, rest: str) -> str:
        """A tensor's name in one of the layers."""
        return f"{self.prefix}{number}{rest}"


def stacks_of(names: Iterable[str]) -> dict[str, Stack]:
    """All numbered places in names, the outer ones first.

    >>> [(s.prefix, s.numbers) for s in stacks_of(["h.0.w", "h.1.w", "0.weight"]).values()]
    [('h.', (0, 1)), ('', (0,))]
    """
    found: dict[str, set[int]] = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            found.setdefault(name[: match.start()], set()).add(int(match[1]))
    return {p: Stack(p, tuple(sorted(n))) for p, n in found.items()}


def with_layers(
    checkpoint: Checkpoint,
    target: Checkpoint,
    stacks: tuple[Stack, Stack],
    likes: Mapping[int, int],
    symmetry: tuple[Symmetry, Roles],
    constant: Callable[[Tensor], Expr],
    active: Callable[[int], Tensor | None] = lambda number: None,
) -> Checkpoint:
    """``checkpoint`` with the layers of ``target``.

    stacks: of the checkpoint and of the target. likes: for numbers of the target's layers those of
    the layers that become them. symmetry: the target's. constant: a tensor as an expression.
    active: for a layer of a chain that goes, the share of samples in which each unit is positive.
    PlanError where a block would have to do nothing and none can.
    """
    old, new = stacks
    stream = stream_of(symmetry[0], symmetry[1], new)
    if stream is None:
        tensors = _chained(checkpoint, stacks, likes, symmetry[0], constant, active)
    else:
        tensors = _residual(checkpoint, target, stacks, likes, symmetry, stream, constant)
    outside = {n: e for n, e in checkpoint.tensors.items() if not _inside(n, old)}
    every = {**outside, **tensors}
    order = [n for n in target.tensors if n in every]
    extra = [n for n in every if n not in target.tensors]
    note = f"layers of {checkpoint.label}: {_told(old, new, likes)}"
    return replace(
        checkpoint,
        tensors={n: every[n] for n in (*order, *extra)},
        notes=(*checkpoint.notes, note),
    )


def _told(old: Stack, new: Stack, likes: Mapping[int, int]) -> str:
    pairs = ", ".join(f"{likes[n]} -> {n}" for n in new.numbers if n in likes)
    gone = [n for n in old.numbers if n not in likes.values()]
    added = [n for n in new.numbers if n not in likes]
    words = [pairs]
    words += [f"{', '.join(map(str, gone))} left out"] if gone else []
    words += [f"{', '.join(map(str, added))} put in"] if added else []
    return "; ".join(words)


def _inside(name: str, stack: Stack) -> bool:
    return name.startswith(stack.prefix) and _number(name, stack) is not None


def _number(name: str, stack: Stack) -> int | None:
    match = re.match(r"(\d+)(?=\.|$)", name[len(stack.prefix) :])
    return int(match[1]) if match and name.startswith(stack.prefix) else None


def _rest(name: str, stack: Stack) -> str:
    tail = name[len(stack.prefix) :]
    return tail[len(str(_number(name, stack))) :]


@dataclass(frozen=True, slots=True)
class Stream:
    """The group that the layers of a residual network read and write.

    opened: whether the first layer reads another one, as where a stage begins.
    """

    group: str
    opened: bool


def stream_of(symmetry: Symmetry, roles: Roles, stack: Stack) -> Stream | None:
    """The stream beside the layers of a stack; None in a chain, where there is none."""
    read: dict[str, set[int]] = {}
    written: dict[str, set[int]] = {}
    outside: set[str] = set()
    for name, layout in symmetry.tensors.items():
        number = _number(name, stack)
        if number is None:
            outside.update(layout.groups())
            continue
        for k, axis in enumerate(layout.axes):
            side = read if k in roles.inputs[name] else written
            for factor in factors_of(axis):
                if factor.group is not None:
                    side.setdefault(factor.group, set()).add(number)
    every, later = set(stack.numbers), set(stack.numbers[1:])
    for group, numbers in written.items():
        own = read.get(group, set())
        if numbers == every and own and own >= later and group in outside:
            return Stream(group, own != every)
    return None


# -- residual networks -----------------------------------------------------------------------------
def _residual(
    checkpoint: Checkpoint,
    target: Checkpoint,
    stacks: tuple[Stack, Stack],
    likes: Mapping[int, int],
    symmetry: tuple[Symmetry, Roles],
    stream: Stream,
    constant: Callable[[Tensor], Expr],
) -> dict[str, Expr]:
    old, new = stacks
    if any(n not in likes for n in new.numbers):
        _check_pre_norm(checkpoint, target, symmetry[0], new, stream.group)
    out: dict[str, Expr] = {}
    for name in (n for n in target.tensors if _inside(n, new)):
        number, rest = _number(name, new), _rest(name, new)
        assert number is not None
        like = likes.get(number)
        source = _neighbour(number, likes, old, stream) if like is None else like
        expr = checkpoint.tensors.get(old.name(source, rest))
        if expr is None:  # what one layer keeps for all, as T5 its positions
            options = (checkpoint.tensors.get(old.name(n, rest)) for n in old.numbers)
            expr = next((e for e in options if e is not None), None)
        if expr is None:
            continue
        if like is None and _ends_a_branch(name, symmetry, stream.group, target):
            expr = linear_sum([(0.0, expr)])
        elif like is None and source == old.numbers[0] and stream.opened:
            expr = _inside_stage(expr, target.tensors[name].shape, name, symmetry, constant)
        out[name] = expr
    return out


def _neighbour(number: int, likes: Mapping[int, int], old: Stack, stream: Stream) -> int:
    """The layer whose readers and norms a block that does nothing takes: the one before it, or
    after it where that one begins a stage."""
    before = [n for n in likes if n < number]
    after = [n for n in likes if n > number]
    if stream.opened and after and (not before or likes[max(before)] == old.numbers[0]):
        return likes[min(after)]
    return likes[max(before)] if before else old.numbers[0]


def _inside_stage(
    expr: Expr,
    wanted: tuple[int, ...],
    name: str,
    symmetry: tuple[Symmetry, Roles],
    constant: Callable[[Tensor], Expr],
) -> Expr:
    """What a block within a stage reads the stream by, where only the first block is there to take
    it from, which reads another stream: nothing."""
    import torch

    if len(wanted) < 2 or not symmetry[1].inputs[name]:
        return expr
    kind = getattr(torch, expr.dtype.name)
    return constant(torch.zeros(expr.shape[0], expr.shape[0], *wanted[2:], dtype=kind))


def _ends_a_branch(
    name: str, symmetry: tuple[Symmetry, Roles], stream: str, target: Checkpoint
) -> bool:
    """Whether a tensor is what a branch writes to the stream by."""
    spec, roles = symmetry
    stem = name.rpartition(".")[0]
    layout = spec.tensors[name]
    weight = name if len(layout.axes) > 1 else f"{stem}.weight"
    if f"{stem}.running_mean" in target.tensors:
        return name.endswith((".weight", ".bias")) and stream in layout.groups()
    known = spec.tensors.get(weight)
    if known is None or len(known.axes) < 2:
        return False
    inside = roles.inputs[weight]
    sides: tuple[set[str], set[str]] = (set(), set())
    for k, axis in enumerate(known.axes):
        sides[k in inside].update(f.group for f in factors_of(axis) if f.group)
    return stream in sides[0] and bool(sides[1]) and stream not in sides[1]


def _check_pre_norm(
    checkpoint: Checkpoint, target: Checkpoint, symmetry: Symmetry, stack: Stack, stream: str
) -> None:
    """PlanError unless a block that writes nothing leaves the stream as it is."""
    kind = str(target.side.config.get("model_type", ""))
    norms = [
        n
        for n, layout in symmetry.tensors.items()
        if _inside(n, stack)
        and len(layout.axes) == 1
        and layout.groups() == [stream]
        and n.endswith(".weight")
        and f"{n.removesuffix('.weight')}.running_mean" not in symmetry.tensors
    ]
    switched = target.side.config.get("do_layer_norm_before") is False
    if norms and (kind not in _PRE_NORM or switched):
        raise PlanError(
            "a layer that does nothing cannot be put into this network",
            model=checkpoint.label,
            tensor=norms[-1],
            found="a norm that may follow the addition to the residual stream, as in BERT",
            expected="branches that are added as they are (pre-norm)",
            do=f"fuse into {checkpoint.label}, so that layers of the deeper model are left out",
        )


# -- chains ----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear map of a chain as expressions."""

    weight: Expr
    bias: Expr | None


def _chained(
    checkpoint: Checkpoint,
    stacks: tuple[Stack, Stack],
    likes: Mapping[int, int],
    symmetry: Symmetry,
    constant: Callable[[Tensor], Expr],
    active: Callable[[int], Tensor | None],
) -> dict[str, Expr]:
    import torch

    old, new = stacks
    maps = _composed(checkpoint, old, set(likes.values()), active)
    out: dict[str, Expr] = {}
    width, like = 0, maps[likes[new.numbers[0]]]
    for number in new.numbers:
        found = maps[likes[number]] if number in likes else None
        if found is None:
            _check_rectified(symmetry, new.name(number, ".weight"))
            kind = getattr(torch, like.weight.dtype.name)
            bias = None if like.bias is None else constant(torch.zeros(width, dtype=kind))
            found = _Linear(constant(torch.eye(width, dtype=kind)), bias)
        width = found.weight.shape[0]
        out[new.name(number, ".weight")] = found.weight
        if found.bias is not None:
            out[new.name(number, ".bias")] = found.bias
    return out


def _composed(
    checkpoint: Checkpoint,
    stack: Stack,
    kept: set[int],
    active: Callable[[int], Tensor | None],
) -> dict[int, _Linear]:
    """The maps of the layers that are kept, each with those before it that go."""
    out: dict[int, _Linear] = {}
    pending: tuple[_Linear, Any] | None = None
    for number in stack.numbers:
        own = _linear(checkpoint, stack, number)
        if pending is not None:
            own = _product(own, *pending)
        pending = None
        if number in kept:
            out[number] = own
        else:
            pending = (own, active(number))
    return out


def _linear(checkpoint: Checkpoint, stack: Stack, number: int) -> _Linear:
    rests = {_rest(n, stack) for n in checkpoint.tensors if _number(n, stack) == number}
    weight = checkpoint.tensors.get(stack.name(number, ".weight"))
    if weight is None or len(weight.shape) != 2 or rests - {".weight", ".bias"}:
        raise PlanError(
            "layers can be put in and taken out of chains of linear maps and residual networks",
            model=checkpoint.label,
            layer=f"{stack.prefix}{number}",
            found=", ".join(sorted(rests)),
            expected="a weight and a bias",
        )
    return _Linear(weight, checkpoint.tensors.get(stack.name(number, ".bias")))


def _product(last: _Linear, first: _Linear, share: Any) -> _Linear:
    """``last`` after ``first``, with what lies between taken for a factor for each unit."""
    import hashlib

    shape = (last.weight.shape[0], first.weight.shape[1])
    factor = 0.5 if share is None else share
    told = "half" if share is None else hashlib.sha256(share.numpy().tobytes()).hexdigest()

    def weight(ours: Tensor, theirs: Tensor) -> Tensor:
        between = factor if isinstance(factor, float) else factor.to(ours)
        return (ours * between) @ theirs

    def bias(ours: Tensor, theirs: Tensor, *own: Tensor) -> Tensor:
        between = factor if isinstance(factor, float) else factor.to(ours)
        found: Tensor = (ours * between) @ theirs
        return found + own[0] if own else found

    scratch = math.prod(last.weight.shape)
    made: Expr = Whole(
        f"composed {told}", weight, (last.weight, first.weight), (), shape, last.weight.dtype,
        scratch=scratch,
    )  # fmt: skip
    offset = last.bias
    if first.bias is not None:
        operands = (last.weight, first.bias, *([] if last.bias is None else [last.bias]))
        offset = Whole(
            f"composed bias {told}", bias, operands, (), (shape[0],), first.bias.dtype,
            scratch=scratch,
        )  # fmt: skip
    return _Linear(made, offset)


def _check_rectified(symmetry: Symmetry, name: str) -> None:
    """PlanError where the units of a chain can change their signs: then no ReLU follows them."""
    layout = symmetry.tensors.get(name)
    for group in [] if layout is None else layout.groups():
        flags = symmetry.groups[group].flags
        if "S" in flags and "D" not in flags:
            raise PlanError(
                "a layer that does nothing cannot be put into this network",
                tensor=name,
                found="an odd activation, such as tanh",
                expected="ReLU, which leaves what it gave as it is",
                do="fuse into the shallower network",
            )
