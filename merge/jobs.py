"""Tasks made ready to be learned on: where tensors lie in modules, heads, data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge.analysis.task import Task
from merge.checkpoint import open_checkpoint
from merge.differences import value_of
from merge.errors import PlanError
from merge.experts import Experts, Tutor
from merge.families.heads import task_heads
from merge.learning.batches import Batches
from merge.learning.coefficients import BASE
from merge.learning.free import free_tensors, set_apart
from merge.learning.latents import Latents
from merge.learning.network import Job
from merge.learning.objectives import CrossEntropy, Negation, Objective
from merge.learning.places import matches, own_tensors, places_of
from merge.learning.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["buffers_of", "check_kept", "fixed_of", "jobs_of", "named_tasks"]


def named_tasks(
    tasks: Mapping[str, Task] | Sequence[Task], experts: Sequence[str]
) -> dict[str, tuple[Task, int | None]]:
    """Tasks by name, each with the number of its expert."""
    if isinstance(tasks, Task):
        tasks = [tasks]
    if isinstance(tasks, Mapping):
        named = {str(n): t for n, t in tasks.items()}
    else:
        by_place = len(tasks) == len(experts)
        named = {}
        for i, task in enumerate(tasks):
            name = task.name or (experts[i] if by_place else f"task {i + 1}")
            if name in named:
                raise PlanError("two tasks have one name", task=name)
            named[name] = task
    if not named:
        raise PlanError("there are no tasks to learn on", expected="at least one")
    by_place = len(named) == len(experts) and not set(named) & set(experts)
    out: dict[str, tuple[Task, int | None]] = {}
    for i, (name, task) in enumerate(named.items()):
        if not isinstance(task, Task):
            raise PlanError(
                "this is no task",
                task=name,
                found=type(task).__name__,
                expected="merge.Task(module, criterion, train=batches, ...)",
                do="for files of data, learn in a recipe (learn: data: ...)"
                if isinstance(task, str)
                else None,
            )
        teacher = i if by_place else experts.index(name) if name in experts else None
        out[name] = (task, teacher)
    return out


def jobs_of(
    models: Experts,
    tasks: Mapping[str, tuple[Task, int | None]],
    tutors: Sequence[Tutor],
    settings: Settings,
    objective: Objective,
) -> tuple[list[Job], list[str]]:
    """The tasks ready to run, and the tensors that are merged."""
    heads = _heads(models, tasks)
    named = [n for n in models.common if n not in heads]
    odd = [n for n in models.odd if n not in heads and not models.odd[n].endswith("no such tensor")]
    if odd:
        raise PlanError(
            "a tensor has different shapes in base and experts",
            tensor=odd[0],
            found=models.odd[odd[0]],
            do="say in each task with head= that it is the task's own",
        )
    shapes = {n: models.base.tensors[n].shape for n in named}
    device = _device_of(tasks)
    jobs = []
    for name, (task, teacher) in tasks.items():
        found = places_of(
            name, shapes, task.module, task.place, _stored(task), _inside_heads(task, heads)
        )
        tutor = None if teacher is None else tutors[teacher]
        given = {} if tutor is None else _heads_of(tutor, task, found, models.wide)
        places, layers = set_apart(name, found, settings.free)
        source = models.base if tutor is None else tutor.model
        for merged, inside in layers.items():
            given[inside] = value_of(source.tensors[merged], merged, models.wide)
        given = {inside: tensor.to(device) for inside, tensor in given.items()}
        own = own_tensors(name, task.module, places, given)
        free = free_tensors(name, task.module, own, layers, settings.free)
        learn, validate = _data(name, task, settings, objective)
        jobs.append(
            Job(
                name,
                task,
                task.module,
                places,
                own,
                task.logits or _logits,
                learn,
                validate,
                teacher,
                task.weight,
                task.classes,
                free,
                device=device,
            )
        )
    return jobs, named


def _device_of(tasks: Mapping[str, tuple[Task, int | None]]) -> str:
    """Where the tasks' modules lie, and so where the merged model runs."""
    found = {
        str(t.device): name
        for name, (task, _) in tasks.items()
        for t in task.module.state_dict().values()
        if not t.is_meta
    }
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise PlanError(
            "the tasks' modules lie on different devices",
            task=second,
            found=f"{other}, and {one} for {first}",
            do="move all modules to one device",
        )
    return next(iter(found), "cpu")


def _heads(models: Experts, tasks: Mapping[str, tuple[Task, int | None]]) -> set[str]:
    """Merged names that are heads of tasks: said by a task, or told by the models' kind."""
    said = {h for task, _ in tasks.values() for h in task.head}
    found = {n for n in (*models.common, *models.odd) if matches(n, said)}
    for task, _ in tasks.values():
        if isinstance(task.place, str):
            found |= {n for n in models.common if matches(f"{task.place}{n}", said)}
    if len(tasks) > 1 and not said:
        for checkpoint in (models.base, *(e for e, _ in models.experts)):
            found |= task_heads(checkpoint)
    return found


def _inside_heads(task: Task, heads: Iterable[str]) -> tuple[str, ...]:
    return (*task.head, *heads)


def _heads_of(
    tutor: Tutor, task: Task, places: Mapping[str, tuple[str, ...]], wide: bool
) -> dict[str, Tensor]:
    """Tensors of an expert that its task's module has besides the merged ones."""
    if not tutor.has_heads:
        return {}
    covered = {n for names in places.values() for n in names}
    wanted = [n for n in task.module.state_dict() if n not in covered]
    stored = {module: file for file, module in _stored(task).items()}
    out = {}
    for name in wanted:
        file = stored.get(name, name)
        expr = tutor.model.tensors.get(file)
        if expr is not None and expr.dtype.kind == "float":
            out[name] = value_of(expr, file, wide)
    return out


def _stored(task: Task) -> Mapping[str, str]:
    """The module's names by those that it has in files."""
    stored = open_checkpoint(task.module).stored if _has_data(task) else None
    return {} if stored is None else stored()


def _has_data(task: Task) -> bool:
    return not any(t.is_meta for t in task.module.state_dict().values())


def _data(
    name: str, task: Task, settings: Settings, objective: Objective
) -> tuple[Batches, Batches | None]:
    """What a task learns on and what it is scored on."""
    labelled = objective.needs == "labels"
    first, second = (task.train, task.adapt) if labelled else (task.adapt, task.train)
    wanted = first if _any(first) else second
    learn = Batches.read(name, wanted, settings.keep)
    if isinstance(objective, CrossEntropy | Negation):
        _check_classes(learn, "labels")
    if _any(task.validate):
        validate = Batches.read(name, task.validate, settings.keep, "choose by")
        if task.has_labels:
            _check_classes(validate, "validation labels")
        return learn, validate
    held = math.ceil(settings.holdout * len(learn))
    if not held or held >= len(learn):
        return learn, None
    count = len(learn) - held
    return learn.part(range(count)), learn.part(range(count, len(learn)))


def _check_classes(data: Batches, what: str) -> None:
    """PlanError where all labels are of one class, which any model gets right by saying it."""
    if data.classes is not None and len(data.classes) == 1 and sum(data.sizes) > 1:
        raise PlanError(
            f"a task's {what} are all of one class, so there is nothing to tell apart",
            task=data.task,
            found=f"class {min(data.classes)} in all {sum(data.sizes)} rows",
            do="shuffle its data before it is cut, or take more of it",
        )


def check_kept(jobs: Sequence[Job], objective: Objective) -> None:
    """PlanError for a negation that forgets nothing, or that nothing holds."""
    if not isinstance(objective, Negation):
        return
    lost = [job.name for job in jobs if objective.forgets(job.name, job.teacher is not None)]
    if not lost:
        raise PlanError(
            "no task is to be forgotten",
            found=", ".join(job.name for job in jobs),
            expected="a task that has an expert, or its name in Negation(forget=...)",
        )
    for job in jobs:
        if job.validate is None and objective.floor > 0:
            raise PlanError(
                "a task has no validation data, by which it is seen what forgetting costs",
                task=job.name,
                do="give validate= batches, more batches, or take Negation(floor=0)",
            )
    if len(lost) == len(jobs) and objective.floor > 0:
        raise PlanError(
            "all tasks are to be forgotten, so nothing says what the merge must still do",
            found=", ".join(lost),
            expected="a control task: one without an expert of its name",
            do="give the data of one, name those to forget, or take Negation(floor=0)",
        )


def _any(data: Iterable[Any]) -> bool:
    return len(data) > 0 if isinstance(data, Sequence) else True


def _logits(out: Any) -> Tensor:
    """Scores of classes in what a module returns: itself, or its ``logits``."""
    import torch

    if isinstance(out, torch.Tensor):
        return out
    found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if found is None and isinstance(out, tuple | list) and out:
        found = out[0]
    if not isinstance(found, torch.Tensor):
        raise PlanError(
            "a task has no head: its module returns no scores of classes",
            found=type(out).__name__,
            expected="a tensor, or something with logits",
            do="say with logits= where they are, or take the model with its head",
        )
    return found


def buffers_of(jobs: Sequence[Job], names: Iterable[str]) -> tuple[str, ...]:
    """Merged tensors that are statistics, not parameters, in any task's module."""
    inside = {n for job in jobs for n, _ in job.module.named_buffers()}
    return tuple(
        n for n in names if any(p in inside for job in jobs for p in job.places.get(n, ()))
    )


def fixed_of(
    settings: Settings,
    latents: Latents,
    buffers: Sequence[str],
    names: Sequence[str],
    jobs: Sequence[Job],
) -> dict[str, Tensor]:
    """Coefficients of tensors that do not move: frozen ones, and statistics."""
    import torch

    frozen = [n for n in latents.layout.tensors if any(re.search(p, n) for p in settings.freeze)]
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in frozen:
            out[name] = latents.coefficients_of(name).detach().clone()
        share = 0.0 if settings.buffers == "base" else 1.0 / len(names)
        for name in buffers:
            out[name] = torch.full_like(latents.coefficients_of(name), share)
            if latents.layout.operands[-1] == BASE:
                out[name][-1] = 1.0
    if len(out) == len(latents.layout.tensors) and not any(job.free for job in jobs):
        raise PlanError("all tensors are frozen", key="freeze", found=", ".join(settings.freeze))
    return out
