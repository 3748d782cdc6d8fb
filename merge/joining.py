"""Networks of one architecture joined into one: what merging in part and zipping share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge import symmetries
from merge.aligning import symmetry_of
from merge.analysis.task import Task
from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import Whole
from merge.ir.expr import Expr
from merge.partial.joined import Membership, joined
from merge.symmetry.roles import resized
from merge.symmetry.symmetry import Layout, Symmetry
from merge.transport.coupling import Couplings, Roles
from merge.transport.mapped import roles_of
from merge.widths import keys_of, sizes_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_shapes", "joined_checkpoint", "symmetry_on", "task_of"]


def check_shapes(first: Checkpoint, second: Checkpoint) -> None:
    """PlanError unless both networks have the same tensors."""
    for name in {**first.tensors, **second.tensors}:
        one, other = (c.tensors[name].shape if name in c.tensors else None for c in (first, second))
        if one != other:
            raise PlanError(
                "the two models differ in a tensor, and cannot be merged in part",
                model=second.label,
                against=first.label,
                tensor=name,
                found="no such tensor" if other is None else list(other),
                expected="no such tensor" if one is None else list(one),
                do="give models of one architecture and size; merge.fuse takes other widths",
            )


def task_of(data: object, model: object, checkpoint: Checkpoint) -> Task:
    """The task that data is or names; of batches of inputs for the module ``model``."""
    from merge.tasks import open_data

    if isinstance(data, list | tuple) and hasattr(model, "named_parameters"):
        return Task(model, _no_loss, train=[(batch, None) for batch in data])  # type: ignore[arg-type]
    return open_data(data, checkpoint)


def _no_loss(out: Any, target: Any) -> Any:
    raise PlanError("batches of inputs have no targets to judge by", do="give a Task")


def symmetry_on(checkpoint: Checkpoint, given: object, task: Task | None) -> Symmetry:
    """The symmetry by what is given, the model's type, or a run of the task's module."""
    if given is None and not checkpoint.side.config and task is not None:
        from merge.tasks import traced_symmetry

        return traced_symmetry(task)
    return symmetry_of(checkpoint, given)


def joined_checkpoint(
    networks: Sequence[Checkpoint],
    own: Symmetry,
    members: Mapping[str, Membership],
    couplings: Sequence[Couplings],
) -> Checkpoint:
    """The networks joined, lazily; what is no float is the first network's; config.json follows."""
    first = networks[0]
    sizes = {g: m.count for g, m in members.items() if m.count != own.groups[g].size}
    target, roles = resized(own, sizes), roles_of(own)
    word = _digest(members)
    tensors: dict[str, Expr] = {}
    for name, expr in first.tensors.items():
        layout = own.tensors.get(name)
        if expr.dtype.kind != "float" or layout is None:
            tensors[name] = expr
            continue
        shape = target.tensors[name].shape
        small = Roles({name: roles.inputs[name]}, roles.flipped)
        tensors[name] = Whole(
            f"joined {name} {word}", _function(name, layout, couplings, small),
            tuple(c.tensors[name] for c in networks), (), shape, expr.dtype,
            scratch=3 * math.prod(shape),
        )  # fmt: skip
    for second, one in first.tied.items():
        tensors[second] = tensors[one]
    side = first.side
    if side.config and sizes:
        keys = keys_of(first, own)
        widths = {keys.get(g) or g: size for g, size in sizes.items()}
        side = side.with_config(sizes_of(first, own, widths)[0])
    roots = tuple(dict.fromkeys(r for c in networks for r in c.roots))
    made = replace(first, tensors=tensors, side=side, roots=roots)
    if side.config and sizes:
        symmetries.symmetry_of(made)  # sizes that do not fit together show here
    return made


def _function(
    name: str, layout: Layout, couplings: Sequence[Couplings], roles: Roles
) -> Callable[..., Tensor]:
    def function(*values: Tensor) -> Tensor:
        return joined(name, values, layout, couplings, roles)

    return function


def _digest(members: Mapping[str, Membership]) -> str:
    """Which units become which, in a word: SHA-256."""
    digest = hashlib.sha256()
    for group, membership in sorted(members.items()):
        digest.update(f"{group} {membership.index.shape} {membership.count} ".encode())
        digest.update(membership.index.tobytes())
    return digest.hexdigest()
