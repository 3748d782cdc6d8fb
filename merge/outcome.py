"""What learning found: the chosen merge, everything that was scored, and how it went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge import run
from merge.checkpoint.memory import open_state_dict
from merge.errors import PlanError, nearest
from merge.experts import Experts
from merge.ir.checkpoint import Checkpoint
from merge.learning.coefficients import Coefficients
from merge.learning.fit import Fitted
from merge.learning.judge import Candidate
from merge.learning.network import TEMPERATURE, Job
from merge.learning.own import Own, built, own_of
from merge.learning.prepare import Preparation, preparation
from merge.learning.state import Step
from merge.plan.model import side_output
from merge.recipe.learned import COEFFICIENTS

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Learned", "outcome"]


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """A merge whose coefficients were learned.

    checkpoint: lazy, as any merge. coefficients: what it was made with. chosen: the name of the
    candidate that it is; scores: all candidates that were scored on validation data. history: the
    loss of each task in each step. dead: tensors that never had a gradient. skipped: by task, steps
    whose loss was not finite. heads: for each task, tensors of its module that were learned too.
    temperatures: of tasks' scores, where they were learned: dividing by them calibrates.
    `module` is the network of one task, ready to run.
    """

    checkpoint: Checkpoint
    coefficients: Coefficients
    chosen: str
    scores: tuple[Candidate, ...]
    history: tuple[Step, ...]
    dead: tuple[str, ...]
    skipped: Mapping[str, int]
    heads: Mapping[str, Mapping[str, Tensor]]
    temperatures: Mapping[str, float]
    notes: tuple[str, ...]
    _jobs: Mapping[str, Job]

    def module(self, task: str) -> nn.Module:
        """A copy of the task's network with the merged tensors, its own head, and its correction.

        What was learned for the task alone (presets ``tinting``, ``surgery``) is part of it, and of
        its state dict. The merge is computed into memory. PlanError for a name that is no task's.
        """
        job = self._jobs.get(task)
        if job is None:
            near = nearest(task, self._jobs)
            raise PlanError(
                "there is no such task",
                task=task,
                expected=f"one of {', '.join(self._jobs)}",
                do=f"did you mean {near!r}?" if near else None,
            )
        own = own_of(job, self.heads.get(task, {}))
        return built(job.module, own, self.checkpoint.state_dict())

    def own(self) -> tuple[Own, ...]:
        """What each task has for itself, for those of which something was learned."""
        return tuple(own_of(self._jobs[t], learned) for t, learned in self.heads.items())

    def files(self) -> dict[str, str | bytes]:
        """The files of an output that tell what was learned, by their paths in it.

        ``coefficients.json``, and a folder ``tasks/NAME`` for each task that has tensors of its
        own, from which `merge.load_task` makes its network.
        """
        from merge.task_files import task_files

        parts = [(own, self._jobs[own.task].module) for own in self.own()]
        return {COEFFICIENTS: self.coefficients.to_json(), **task_files(parts)}

    def save(self, out: str | Path, *, replace: bool = False, **how: Any) -> Path:
        """Compute the merge into the folder ``out``, with `files` beside it, whole or not at all.

        how: as for `Checkpoint.save`: memory, threads, device, shard_size, card.
        """
        side = [side_output(n, content) for n, content in self.files().items()]
        made = run.plan(self.checkpoint, run.PlanOptions(**how), extra=side)
        return run.save_plan(made, Path(out), run.WriteOptions(replace)).path

    def report(self) -> str:
        """What was learned, as text: the candidates with their scores, coefficients, oddities."""
        lines = [f"chosen: {self.chosen}"]
        if self.scores:
            tasks = list(self.scores[0].tasks)
            lines.append(f"{'candidate':<28} {'mean':>8}  " + "  ".join(f"{t:>8.8}" for t in tasks))
            for c in sorted(self.scores, key=lambda c: -c.score)[:12]:
                row = "  ".join(f"{c.tasks[t]:8.4f}" for t in tasks)
                lines.append(f"{c.name:<28.28} {c.score:8.4f}  {row}")
        if self.history:
            first, last = (
                math.fsum(s.losses.values()) for s in (self.history[0], self.history[-1])
            )
            lines.append(f"loss, sum over tasks: {first:.4f} at first, {last:.4f} at last")
        table = self.coefficients.table()
        for operand in self.coefficients.operands:
            values = [row[operand] for row in table.values()]
            mean = math.fsum(values) / len(values)
            span = f"{min(values):.3f} to {max(values):.3f}"
            lines.append(f"coefficients of {operand}: mean {mean:.3f}, {span}")
        for task, value in self.temperatures.items():
            lines.append(f"temperature of {task}: {value:.4g}")
        if self.dead:
            lines.append(f"without gradient: {len(self.dead)} tensors, such as {self.dead[0]}")
        for task, count in self.skipped.items():
            lines.append(f"not finite, left out: {count} steps of {task}")
        return "\n".join([*lines, *self.notes])


def outcome(fitted: Fitted, models: Experts, prepare: Preparation, jobs: Sequence[Job]) -> Learned:
    """What a fit has found, as a checkpoint and in words."""
    coefficients = fitted.chosen.coefficients
    assert coefficients is not None
    if coefficients.prepare == "none":
        prepare = preparation("none", coefficients.seed)
    checkpoint = models.merged(coefficients, prepare)
    heads = {
        task: kept
        for task, found in fitted.free.items()
        if (kept := {n: t for n, t in found.items() if n != TEMPERATURE})
    }
    temperatures = {
        task: math.exp(float(found[TEMPERATURE]))
        for task, found in fitted.free.items()
        if TEMPERATURE in found
    }
    coefficients = replace(coefficients, tasks=tuple(heads))
    if fitted.statistics:
        measured = open_state_dict(dict(fitted.statistics), "recalibrated statistics")
        checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **measured.tensors})
    odd = [f"{n}: the base's ({why})" for n, why in models.odd.items()]
    return Learned(
        checkpoint,
        coefficients,
        fitted.chosen.name,
        fitted.trials,
        fitted.history,
        fitted.dead,
        fitted.skipped,
        heads,
        temperatures,
        (*fitted.notes, *odd[:8]),
        {job.name: job for job in jobs},
    )
