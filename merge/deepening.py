"""Networks of different depths: one of them gets as many layers as the other, lazily."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from merge.aligning import symmetry_of
from merge.checkpoint.memory import open_state_dict
from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Expr
from merge.symmetry.resolve import resolve
from merge.symmetry.spec import GroupSpec, Spec
from merge.symmetry.symmetry import Symmetry
from merge.transport.depth import align_layers, answers_of, layer_costs, size_costs
from merge.transport.layers import Stack, stacks_of, stream_of, with_layers
from merge.transport.mapped import roles_of

if TYPE_CHECKING:
    from torch import Tensor

    from merge.tasks import Pair

__all__ = ["Deepened", "as_deep", "fitted"]


@dataclass(frozen=True, slots=True, eq=False)
class Deepened:
    """A checkpoint with the layers of another, its symmetry, and where each module comes from."""

    checkpoint: Checkpoint
    symmetry: Symmetry
    change: Callable[[Checkpoint], Checkpoint]
    modules: Mapping[str, str | None] = field(default_factory=dict)  # prefixes: target -> moving

    def layer_of(self, name: str) -> str | None:
        """The moving network's name of a module of the target; None for one that was put in."""
        for new, old in self.modules.items():
            if name == new or name.startswith(f"{new}."):
                return None if old is None else old + name[len(new) :]
        return name


def as_deep(
    moving: Checkpoint,
    target: Checkpoint,
    symmetry: object,
    depth: str | None = None,
    pair: Pair | None = None,
) -> Deepened:
    """``moving`` with as many layers as ``target``: itself where it has as many.

    symmetry: a symmetry or a spec, of the target where depths differ. depth: what layers are
    compared by; by default ``cka`` with data and ``count`` without. pair: both networks with data.
    """
    pairs = _different(moving, target)
    if not pairs:
        return Deepened(moving, fitted(symmetry, moving), lambda checkpoint: checkpoint)
    wanted = symmetry_of(target, symmetry)
    roles = roles_of(wanted)
    kind = depth or ("count" if pair is None else "cka")
    modules: dict[str, str | None] = {}
    changes: list[tuple[tuple[Stack, Stack], dict[int, int], Any]] = []
    for old, new in pairs:
        stream = stream_of(wanted, roles, new)
        chain = stream is None
        ends = {"first": stream is None or stream.opened, "last": chain}
        likes = _likes(moving, target, (old, new), ends, kind, pair)
        shorter = chain and len(old.numbers) > len(new.numbers)
        changes.append(((old, new), likes, _active(pair, old) if shorter else _unknown))
        for number in new.numbers:
            like = likes.get(number)
            if like is None and chain:  # the identity answers what the layer before it did
                like = likes[max(n for n in likes if n < number)]
            modules[f"{new.prefix}{number}"] = None if like is None else f"{old.prefix}{like}"

    def change(checkpoint: Checkpoint) -> Checkpoint:
        for stacks, likes, active in changes:
            checkpoint = with_layers(
                checkpoint, target, stacks, likes, (wanted, roles), _constant, active
            )
        return checkpoint

    current = change(moving)
    return Deepened(current, fitted(symmetry, current), change, modules)


def fitted(symmetry: object, moving: Checkpoint) -> Symmetry:
    """A symmetry or spec in the sizes of ``moving``."""
    if not isinstance(symmetry, Symmetry):
        return symmetry_of(moving, symmetry)
    shapes = {n: e.shape for n, e in moving.tensors.items()}
    if all(n in symmetry.tensors and symmetry.tensors[n].shape == s for n, s in shapes.items()):
        return symmetry
    return resolve(_as_spec(symmetry), shapes, moving.side.config)


def _as_spec(symmetry: Symmetry) -> Spec:
    """A symmetry without sizes, to be fitted to other ones."""
    groups = {
        n: GroupSpec(n, g.flags, None, g.per, g.output, g.reason)
        for n, g in symmetry.groups.items()
    }
    tensors = {}
    for name, layout in symmetry.tensors.items():
        pattern = layout.pattern if layout.stack else name
        tensors[pattern] = tuple(
            axis.map(lambda f: replace(f, size=0) if f.group else f) for axis in layout.axes
        )
    return Spec("", groups, tensors, dict(symmetry.reasons), symmetry.notes)


def _different(moving: Checkpoint, target: Checkpoint) -> list[tuple[Stack, Stack]]:
    """The stacks that differ in length, the outer ones; none inside another."""
    ours, theirs = stacks_of(moving.tensors), stacks_of(target.tensors)
    found: list[tuple[Stack, Stack]] = []
    for prefix, old in ours.items():
        new = theirs.get(prefix)
        inside = any(prefix.startswith(o.prefix) and prefix != o.prefix for o, _ in found)
        if new is not None and old.numbers != new.numbers and not inside:
            found.append((old, new))
    return found


def _likes(
    moving: Checkpoint,
    target: Checkpoint,
    stacks: tuple[Stack, Stack],
    ends: dict[str, bool],
    kind: str,
    pair: Pair | None,
) -> dict[int, int]:
    """For numbers of the target's layers the moving network's. ends: which ends are matched."""
    old, new = stacks
    chain = ends["last"]
    ours, theirs = old.numbers, new.numbers
    if chain:  # the last map gives the outputs, whose units are fixed
        ours, theirs = ours[:-1], theirs[:-1]
    if kind == "count":
        cost = size_costs(_units(moving, old, ours), _units(target, new, theirs))
    else:
        if pair is None:
            raise PlanError(
                "layers are compared by what they answer, and there is no data",
                key="depth",
                found=kind,
                do="give data, or depth: count",
            )
        cost = _answered(pair, (old, ours), (new, theirs), kind)
    if len(ours) <= len(theirs):
        places = align_layers(cost, **ends)
        likes = {theirs[p]: ours[k] for k, p in enumerate(places)}
    else:
        places = align_layers(cost.T, **ends)
        likes = {theirs[k]: ours[p] for k, p in enumerate(places)}
    if chain:
        likes[new.numbers[-1]] = old.numbers[-1]
    return likes


def _units(checkpoint: Checkpoint, stack: Stack, numbers: Sequence[int]) -> list[int]:
    """Rows of each layer's largest matrix: what a layer's width is told by."""
    out = []
    for number in numbers:
        start = f"{stack.prefix}{number}."
        shapes = [e.shape for n, e in checkpoint.tensors.items() if n.startswith(start)]
        out.append(max((s[0] for s in shapes if len(s) > 1), default=1))
    return out


def _answered(
    pair: Pair, ours: tuple[Stack, Sequence[int]], theirs: tuple[Stack, Sequence[int]], kind: str
) -> Any:
    answers = []
    places = zip(pair.modules(), pair.tasks, (ours, theirs), strict=True)
    for module, task, (stack, numbers) in places:
        answers.append(answers_of(module, [f"{stack.prefix}{n}" for n in numbers], task.inputs()))
    chosen: Literal["cka", "wasserstein"] = "cka" if kind == "cka" else "wasserstein"
    return layer_costs(answers[0], answers[1], chosen)


def _unknown(_number: int) -> Tensor | None:
    """Nothing is known of a layer's units."""
    return None


def _active(pair: Pair | None, stack: Stack) -> Callable[[int], Tensor | None]:
    """Of a layer's units the share of samples in which each is positive, where there is data."""
    if pair is None:
        return _unknown
    module = pair.modules()[0]
    inputs = pair.tasks[0].inputs()

    def share(number: int) -> Tensor | None:
        (found,) = answers_of(module, [f"{stack.prefix}{number}"], inputs)
        return (found > 0).float().mean(0)

    return share


def _constant(tensor: Tensor) -> Expr:
    """A tensor as an expression, in memory."""
    return open_state_dict({"constant": tensor}, "constant").tensors["constant"]
