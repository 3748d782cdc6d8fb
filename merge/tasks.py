"""Checkpoints run in code: matched on data, put right after a merge."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge.alignment.report import Match
from merge.analysis.task import Task
from merge.checkpoint.memory import open_state_dict
from merge.errors import MergeError, PlanError, RecipeError, told
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Expr, Read
from merge.streams.spec import KINDS
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merge.aligning import How
    from merge.carrying import Transport
    from merge.transport.couple import Coupled

__all__ = [
    "Pair",
    "couple_on_data",
    "match_on_data",
    "match_states",
    "names_in_files",
    "open_data",
    "pair_of",
    "repaired",
    "state_of",
    "symmetry_for",
    "traced_symmetry",
]


def open_data(
    data: object,
    *checkpoints: Checkpoint,
    batch: int | None = None,
    limit: int | None = None,
) -> Task:
    """The task that ``data`` is or names, for the models in the folders of checkpoints.

    batch, limit: as for `merge.streams.open.open_task`.
    """
    from merge.streams.open import limited, open_task

    if isinstance(data, Task):
        return limited(data, batch, limit)
    if data is None:
        raise RecipeError(
            "this needs data, and none was given",
            key="data",
            expected=KINDS,
        )
    roots = [r for c in checkpoints for r in c.roots if (Path(r) / "config.json").is_file()]
    return open_task(str(data), roots[0] if roots else None, batch=batch, limit=limit)


def state_of(task: Task, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names of the task's module, floats in float32."""
    if task.load is None:
        return task.fits(checkpoint.state_dict(), checkpoint.label)
    if _is_folder(checkpoint):
        return task.fits(task.load(checkpoint.roots[0]), checkpoint.label)
    with tempfile.TemporaryDirectory(prefix="merge-") as place:
        checkpoint.save(Path(place) / "model", card=False)
        return task.fits(task.load(Path(place) / "model"), checkpoint.label)


def _is_folder(checkpoint: Checkpoint) -> bool:
    """Whether it is what lies in one folder, unchanged."""
    return len(checkpoint.roots) == 1 and all(
        isinstance(e, Read) and e.source.files and e.spec.name == n
        for n, e in checkpoint.tensors.items()
    )


def match_on_data(first: Checkpoint, second: Checkpoint, own: Symmetry, how: How) -> Match:
    """The element of the second checkpoint's symmetry that data finds."""
    from merge.aligning import symmetry_of

    task = open_data(how.data, second, first)
    a, b = (state_of(task, c) for c in (first, second))
    inside = symmetry_of(replace(open_state_dict(b), side=second.side), how.symmetry)
    _check_groups(inside, own, second)
    return match_states(task, inside, a, b, how.method, keep=how.keep, signed=how.signed)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two networks of whatever sizes, each with data of its own kind: the moving one first."""

    checkpoints: tuple[Checkpoint, Checkpoint]
    tasks: tuple[Task, Task]
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Both networks, ready to be run."""
        (one, first), (two, second) = zip(self.tasks, self.states, strict=True)
        return _with(one.module, first), _with(two.module, second)


def pair_of(data: object, moving: Checkpoint, target: Checkpoint) -> Pair:
    """The networks with their data: one source for both, or a list of one for each."""
    given = list(data) if isinstance(data, list | tuple) else [data]
    both = (moving, target)
    tasks = [open_data(d, c) for d, c in zip((given[0], given[-1]), both, strict=True)]
    states = [state_of(t, c) for t, c in zip(tasks, both, strict=True)]
    return Pair(both, (tasks[0], tasks[1]), (states[0], states[1]))


def symmetry_for(pair: Pair, which: int, given: object) -> Symmetry:
    """The symmetry of one of the modules: by what is given, the model's type, or one run of it."""
    from merge.aligning import symmetry_of
    from merge.deepening import fitted

    checkpoint, task = pair.checkpoints[which], pair.tasks[which]
    if given is None and not checkpoint.side.config:
        return traced_symmetry(task)
    state = replace(open_state_dict(pair.states[which]), side=checkpoint.side)
    found = fitted(given, state) if isinstance(given, Symmetry) else symmetry_of(state, given)
    return found


def couple_on_data(pair: Pair, own: Symmetry, other: Symmetry, how: Transport) -> Coupled:
    """The couplings that data finds. own, other: what the checkpoints' symmetries are, by which
    those of the modules are checked."""
    from merge.aligning import symmetry_of
    from merge.deepening import as_deep
    from merge.transport.activations import Seen, couple_activations

    a, b = (
        replace(open_state_dict(state), side=c.side, label=c.label)
        for state, c in zip(pair.states, pair.checkpoints, strict=True)
    )
    deep = as_deep(a, b, how.symmetry, how.depth, pair)
    inside = symmetry_of(b, how.symmetry)
    _check_groups(deep.symmetry, own, pair.checkpoints[0])
    _check_groups(inside, other, pair.checkpoints[1])
    modules = pair.modules()
    inputs = [t.inputs() for t in pair.tasks]
    return couple_activations(
        Seen(modules[0], deep.symmetry, inputs[0]), Seen(modules[1], inside, inputs[1]),
        how.manner, policy=how.residual, keep=how.keep, layer_of=deep.layer_of,  # type: ignore[arg-type]
    )  # fmt: skip


def _check_groups(inside: Symmetry, wanted: Symmetry, checkpoint: Checkpoint) -> None:
    """PlanError unless the module that data runs has the checkpoint's groups."""
    if inside.groups == wanted.groups:
        return
    every = {**wanted.groups, **inside.groups}
    odd = next(n for n in every if wanted.groups.get(n) != inside.groups.get(n))
    raise PlanError(
        "the module that the data runs has other groups than the checkpoint",
        model=checkpoint.label,
        group=odd,
        found=inside.groups.get(odd),
        expected=wanted.groups.get(odd),
        do="check that the data's module is this model's architecture",
    )


def traced_symmetry(task: Task) -> Symmetry:
    """What may be exchanged in the task's module, derived from one run of it.

    PlanError where the module cannot be traced.
    """
    from merge.tracing.derive import derive

    inputs = task.inputs()[0]
    few = {k: v[:2] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs
    try:
        return derive(task.module, few if isinstance(few, Mapping | tuple) else (few,)).symmetry
    except MergeError as error:
        raise error.at(network=type(task.module).__name__) from None
    except Exception as error:  # the module's own code may raise anything under the tracer
        raise PlanError(
            "what may be exchanged in the network cannot be derived from a run of it",
            network=type(task.module).__name__,
            found=told(error),
            do="give a symmetry spec, or leave out the alignment",
        ) from error


def match_states(
    task: Task,
    symmetry: Symmetry,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    method: str,
    *,
    keep: Collection[str] = (),
    signed: bool = False,
) -> Match:
    """The element that brings the module's tensors ``b`` to ``a``."""
    from merge.alignment.activation import match_activations
    from merge.alignment.ste import InMemory, match_straight_through
    from merge.alignment.weight import match_weights

    if method == "weight":
        return match_weights(symmetry, InMemory(a), InMemory(b), keep=keep, signed=signed)
    if method == "activation":
        one, two = (_with(task.module, state) for state in (a, b))
        return match_activations(symmetry, one, two, task.inputs(), keep=keep, signed=signed)
    return match_straight_through(symmetry, a, b, task.train, task.loss, keep=keep)


def _with(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module with other weights, ready to be run."""
    import copy

    other = copy.deepcopy(module)
    other.load_state_dict(dict(state))
    return other.eval()


def repaired(
    merged: Checkpoint,
    parents: Sequence[Checkpoint],
    data: str | Task | None,
    weights: Sequence[float] | None = None,
) -> tuple[Checkpoint, str]:
    """The merged checkpoint with its statistics put right, and in words what was done.

    parents: in the merged checkpoint's coordinates. The whole of it is computed in memory.
    """
    from merge.alignment.repair import repair

    task = open_data(data, merged, *parents)
    state = state_of(task, merged)
    found = repair(
        task.module, state, [state_of(task, p) for p in parents], task.inputs(), weights=weights
    )
    names = names_in_files(task, merged)
    tensors: dict[str, Expr] = dict(merged.tensors)
    new = open_state_dict({names.get(n, n): t for n, t in found.tensors.items()}, "repaired")
    for name, expr in new.tensors.items():
        if name not in tensors:
            raise PlanError(
                "a repaired tensor is not one of the checkpoint's",
                tensor=name,
                model=merged.label,
                do="give the task's module the names of the checkpoint's tensors",
            )
        tensors[name] = expr
    told = f"{found.kind} of {len(found.layers)} layers"
    if merged.out_dtype is None:
        kinds = {e.dtype for n, e in merged.tensors.items() if e.dtype.kind == "float"}
        merged = replace(merged, out_dtype=kinds.pop() if len(kinds) == 1 else None)
    return replace(merged, tensors=tensors), "; ".join([told, *found.notes])


def names_in_files(task: Task, merged: Checkpoint) -> dict[str, str]:
    """From names in the module to those of the checkpoint, where they differ."""
    from merge.checkpoint import open_checkpoint

    if task.load is None:
        return {}
    stored = open_checkpoint(task.module).stored
    names = {} if stored is None else stored()
    return {module: file for file, module in names.items() if file in merged.tensors}
