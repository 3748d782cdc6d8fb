"""Scores of checkpoints on data: the share that is right, or the loss, over one task or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge.analysis.task import Task
from merge.checkpoint import open_checkpoint
from merge.checkpoint.memory import open_state_dict
from merge.errors import MergeError, PlanError
from merge.families.heads import task_heads
from merge.ir.checkpoint import Checkpoint
from merge.learning.places import matches
from merge.tasks import names_in_files, state_of

if TYPE_CHECKING:
    from torch import Tensor

    from merge.recipe.tune_words import DataEntry

__all__ = ["Judge", "in_memory", "open_tasks", "state_from"]


def open_tasks(
    data: Mapping[str, DataEntry],
    folders: Sequence[str],
    own: Mapping[str, Sequence[str]] | None = None,
) -> list[Task]:
    """The tasks of a recipe's ``data``, run in the first folder of transformers among ``folders``.

    own: folders by name: a task of that name runs there, and keeps the head that it finds there. A
    task's ``model`` goes before both, be it a folder or a function.
    """
    from merge.streams.open import open_task

    found = []
    for name, entry in data.items():
        options = {k: v for k, v in entry.options.items() if k != "weight"}
        mine = _transformers(() if entry.head is not None else (own or {}).get(name, ()))
        if "model" in options and Path(options["model"]).is_dir():
            mine = [options.pop("model")]
        folder = next(iter([*mine, *_transformers(folders)]), None)
        task = open_task(options, folder, name)
        head = task.head
        if mine and not head and task.load is not None:
            head = tuple(sorted(task_heads(open_checkpoint(mine[0]))))
        weight = task.weight if entry.weight is None else entry.weight
        found.append(replace(task, weight=weight, head=head))
    return found


def _transformers(folders: Sequence[str]) -> list[str]:
    return [f for f in folders if (Path(f) / "config.json").is_file()]


@dataclass(slots=True)
class Judge:
    """A score by tasks: the mean over them, higher is better.

    metric: ``accuracy`` (the share right), ``loss`` (its negative), or None: accuracy where all
    tasks have one. Tasks are judged on ``validate``, or on ``train`` where they have none.
    """

    tasks: Sequence[Task]
    metric: str | None = None

    def __post_init__(self) -> None:
        without = [t for t in self.tasks if t.right is None]
        if self.metric == "accuracy" and without:
            raise PlanError(
                "a task has no accuracy",
                task=without[0].name or None,
                expected="labels, and `right` where the task is your own",
                do="take metric: loss",
            )
        self.metric = self.metric or ("loss" if without else "accuracy")
        for task in self.tasks:
            if not len(self.part(task)):
                raise PlanError(
                    "there is no data to choose by",
                    task=task.name or None,
                    expected="examples in the part validate",
                )

    def part(self, task: Task) -> Sequence[tuple[object, object]]:
        """The batches that a task is judged on."""
        return list_of(task.validate) or task.train

    def told(self) -> str:
        """What is measured, in words."""
        odd = [t.name for t in self.tasks if not list_of(t.validate)]
        where = "train, there being no part validate" if odd else "validate"
        return f"{self.metric} on {where}"

    def __call__(self, state: Callable[[Task], Mapping[str, Tensor]]) -> float:
        """The score. state: the tensors of a task's module."""
        total = weight = 0.0
        for task in self.tasks:
            try:
                found = task.measure(state(task), self.part(task))
            except MergeError as error:
                raise error.at(task=task.name or None) from None
            one = -found.loss if self.metric == "loss" or found.right is None else found.right
            total += task.weight * one
            weight += task.weight
        return total / weight if weight else total


def list_of(part: object) -> Sequence[tuple[object, object]]:
    """A part as a sequence; one that can be gone through only once is drawn."""
    return part if isinstance(part, Sequence) else tuple(part)  # type: ignore[arg-type]


def in_memory(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Checkpoint:
    """The checkpoint with its tensors computed; written in the element types that it had."""
    known = {e.dtype for n, e in checkpoint.tensors.items() if e.dtype.kind == "float"}
    stored = checkpoint.out_dtype or (known.pop() if len(known) == 1 else None)
    held = open_state_dict(state, checkpoint.label)
    return replace(checkpoint, tensors=held.tensors, tied=held.tied, out_dtype=stored)


def state_from(
    task: Task, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``tensors`` of a checkpoint under the names of the task's module, its head the task's own.

    Where the names do not lead there, the checkpoint is written and loaded by the task.
    """
    module = task.module
    wanted = module.state_dict()
    names = names_in_files(task, checkpoint)
    own = {n for n in wanted if matches(n, task.head) or matches(names.get(n, n), task.head)}
    if task.load is None:
        rest = {n: t for n, t in tensors.items() if not matches(n, task.head)}
        return task.fits({**rest, **{n: wanted[n] for n in own}}, checkpoint.label)
    found = {n: tensors[f] for n in wanted if (f := names.get(n, n)) in tensors and n not in own}
    found.update((n, wanted[n]) for n in own)
    same: dict[int, str] = {}
    for name in found:
        same.setdefault(wanted[name].data_ptr(), name)
    buffers = {n for n, _ in module.named_buffers()}
    for name, tensor in wanted.items():
        if name not in found and tensor.data_ptr() in same:
            found[name] = found[same[tensor.data_ptr()]]
        elif name not in found and name in buffers:
            found[name] = tensor
    if found.keys() != wanted.keys():
        return state_of(task, in_memory(checkpoint, tensors))
    return task.fits(found, checkpoint.label)
