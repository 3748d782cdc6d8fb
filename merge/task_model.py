"""The whole model of one task of a learned merge, as a checkpoint: to be saved by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge.checkpoint import open_checkpoint
from merge.errors import PlanError
from merge.families.heads import task_heads
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Expr
from merge.learning.own import Own
from merge.task_files import own_file, read_own

__all__ = ["open_task"]


def open_task(out: str | Path, task: str) -> Checkpoint:
    """The whole model of one task of a learned merge, not yet computed.

    The merged tensors and the task's own over them, under the names that they have in the task's
    network, with the task's config: what `transformers` loads as any other model. out: as for
    `merge.load_task`. PlanError for a name that is no task's, and for a task with a correction,
    which no weights can express: `merge.load_task` runs it.

    Example::

        merge.open_task("out", "topics").save("topics-merged")
    """
    own, config = read_own(out, task)
    if own.layer is not None:
        raise PlanError(
            "a task's correction is no part of a model's weights",
            task=task,
            layer=own.layer or "the network itself",
            do="merge.load_task in Python gives a network that has it",
        )
    merged = open_checkpoint(str(out))
    alone = open_checkpoint(own_file(out, task))
    tensors, tied = _joined(own, merged, alone)
    kinds = {e.dtype for e in merged.tensors.values() if e.dtype.kind == "float"}
    return replace(
        merged,
        tensors=tensors,
        tied=tied,
        label=f"{task} of {merged.label}",
        side=merged.side.with_config(config) if config else merged.side,
        out_dtype=kinds.pop() if len(kinds) == 1 else None,
        folders={},
        dropped={n: f"it is no tensor of {task}" for n in task_heads(merged) if n not in tensors},
        roots=tuple(dict.fromkeys([*merged.roots, *alone.roots])),
    )


def _joined(
    own: Own, merged: Checkpoint, alone: Checkpoint
) -> tuple[dict[str, Expr], dict[str, str]]:
    """The tensors of a task's network by their names there, and second names of the same ones."""
    heads = task_heads(merged)
    places = own.places or {}
    tensors: dict[str, Expr] = {}
    tied: dict[str, str] = {}
    for name, expr in merged.tensors.items():
        inside = places.get(name, (name,))
        if name in merged.folders or (name in heads and name not in places):
            continue
        if name in merged.tied:
            tied[inside[0]] = places.get(merged.tied[name], (merged.tied[name],))[0]
        tensors[inside[0]] = expr
    for name, expr in alone.tensors.items():
        tensors[name] = expr
        tied.pop(name, None)
    return tensors, tied
