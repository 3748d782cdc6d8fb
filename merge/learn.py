"""Learn the coefficients of a merge from data: checkpoints, tasks and learning joined."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.analysis.task import Task
from merge.checkpoint import open_checkpoint
from merge.differences import Stored, value_of
from merge.errors import PlanError, RecipeError, SourceError, nearest
from merge.experts import Experts, check_tutors, opened, tutors_of
from merge.families.layers import place_of
from merge.ir.checkpoint import Checkpoint
from merge.jobs import buffers_of, check_kept, fixed_of, jobs_of, named_tasks
from merge.learning.coefficients import Coefficients
from merge.learning.fit import Fit
from merge.learning.free import with_temperatures
from merge.learning.latents import Latents
from merge.learning.layout import layout_of
from merge.learning.network import Job
from merge.learning.objectives import Objective
from merge.learning.prepare import Preparation, preparation
from merge.learning.settings import Settings, objective_of, settings_of
from merge.learning.state import Step
from merge.learning.store import Store
from merge.learning.surgery import with_bottlenecks
from merge.learning.survey import survey
from merge.outcome import Learned, outcome
from merge.states import read_state, write_state

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Learned", "apply_coefficients", "learn"]


def learn(
    experts: Mapping[str, object] | Sequence[object],
    *,
    base: object,
    tasks: Mapping[str, Task] | Sequence[Task],
    preset: str | None = None,
    teachers: Mapping[str, object] | Sequence[object] | None = None,
    state: str | Path | None = None,
    progress: Callable[[Step], None] | None = None,
    **how: Any,
) -> Learned:
    """A merge of experts whose coefficients are learned on data of their tasks.

    The merged tensor is ``base + sum_k c_k (expert_k - base)``, with numbers c for each expert and
    block. By default they are learned layer by layer so that the merged model answers as each
    expert does on inputs of its task, which takes no labels.

    experts, base: anything `merge.open` takes; lazy checkpoints too, so that differences may come
    from any other method; differences of weights are taken as they are. tasks: `merge.Task`s by
    name, or one for each expert. A task is its expert's by name, else by place where there are as
    many tasks as experts; a task without an expert is learned from labels. preset: see
    ``merge.learning.presets``: ``adamerging``, ``spectral_gates``, ... teachers: the models that
    tasks learn from, where those are not the experts: one for each, or by the names of tasks.
    state: a file that the state is kept in: if it exists, learning goes on from there, to the bit;
    after an error it holds the best so far. progress: called with each step. how: settings, which
    go before the preset's; see `merge.learning.settings.Settings` for all.

    Returned is the best on validation data of: the learned coefficients at every scoring, their
    start, the base, and task arithmetic at several scales. Raises PlanError and SourceError, with
    the name of the task, for data, labels, heads or models that do not fit.

    Example::

        found = merge.learn({"math": "run-a", "code": "run-b"}, base="base", tasks=tasks,
                            preset="spectral_gates")
        print(found.report())
        found.checkpoint.save("merged")
    """
    settings = settings_of(preset, how)
    objective = objective_of(settings.objective, settings.surgery)
    models = opened(experts, "experts")
    if not models:
        raise PlanError("there are no experts to merge", expected="at least one")
    together = Experts.of(models, open_checkpoint(base))
    tutors = tutors_of(teachers, together)
    known = named_tasks(tasks, [t.name for t in tutors])
    jobs, named = jobs_of(together, known, tutors, settings, objective)
    check_tutors(tutors, named)
    check_kept(jobs, objective)
    buffers = buffers_of(jobs, named)
    device = jobs[0].device
    source = Stored(together.base, together.experts, wide=together.wide, device=device)
    seen = survey(source, named, list(models))
    prepare = _prepared(preparation(settings.prepare, settings.seed), source, named)
    tables = together.tables()
    store = Store(
        source,
        prepare,
        settings.memory,
        learns_base=settings.learn_base,
        vocabularies=tables or None,
        empty=frozenset() if settings.learn_base else seen.empty,
    )
    shapes = {n: together.base.tensors[n].shape for n in named}
    link = settings.link_of()
    directions = {
        n: found
        for n, shape in shapes.items()
        if (found := prepare.directions(shape, len(models), store.vocabulary(n))) is not None
    }
    layout = layout_of(
        list(models),
        shapes,
        settings.granularity,
        link,
        layer_of=_layer_of,
        groups=settings.groups,
        directions=directions,
        knots=settings.depth_smooth,
        base=settings.learn_base,
    )
    latents = Latents(layout, _start(settings, list(models)))
    if settings.surgery is not None:
        layer, rank = settings.surgery, settings.surgery_rank
        theta = {n: source.base(n) for n in named}
        jobs = with_bottlenecks(jobs, layer, rank, theta, settings.seed)
        del theta
    if settings.temperature:
        jobs = with_temperatures(jobs, objective)
    fit = Fit(
        jobs,
        store,
        latents,
        settings,
        objective,
        lambda i, name: value_of(tutors[i].model.tensors[name], name, together.wide).to(device),
        fixed_of(settings, latents, buffers, list(models), jobs),
        _fingerprint(settings, objective, seen.digest, jobs),
        _recalibrate(jobs, buffers) if settings.buffers == "recalibrate" and buffers else None,
        None if state is None else lambda s: write_state(Path(state), s),
        progress,
    )
    normed = sum(n.endswith("running_var") for n in buffers)
    if normed and settings.buffers == "base":
        fit.notes.append(
            f"{normed} layers of BatchNorm have the base's statistics, which are not those of the"
            " merge; buffers: recalibrate measures them"
        )
    resume = None if state is None else read_state(Path(state), fit.fingerprint)
    fitted = fit.run(resume)
    return outcome(fitted, together, prepare, jobs)


def apply_coefficients(
    coefficients: Coefficients | str | Path,
    experts: Mapping[str, object] | Sequence[object],
    base: object,
) -> Checkpoint:
    """The merge that learned coefficients make of these models, not yet computed.

    coefficients: what `merge.learn` found, or a JSON file of it. experts: by the names that the
    coefficients have, or in their order; the models may be others than those it was learned on, of
    the same tensors. Where an expert's entries are trimmed together (``ties:...:global``), the
    experts are read now. PlanError where a tensor or an expert is missing.
    """
    if not isinstance(coefficients, Coefficients):
        file = Path(coefficients)
        try:
            text = file.read_bytes()
        except OSError as error:
            raise SourceError("coefficients cannot be read", file=file, found=error) from None
        try:
            coefficients = Coefficients.from_json(text)
        except SourceError as error:
            raise error.at(file=file) from None
    names = coefficients.experts
    given = experts if isinstance(experts, Mapping) else dict(zip(names, experts, strict=False))
    if set(given) != set(names) or len(experts) != len(names):
        raise PlanError(
            "the coefficients are of other experts",
            found=f"{len(experts)} experts"
            + (f": {', '.join(experts)}" if isinstance(experts, Mapping) else ""),
            expected=f"{len(names)}: {', '.join(names)}",
        )
    models = opened({n: given[n] for n in names}, "experts")
    together = Experts.of(models, open_checkpoint(base))
    source = Stored(together.base, together.experts, wide=together.wide)
    prepare = preparation(coefficients.prepare, coefficients.seed)
    prepare = _prepared(prepare, source, [n for n in coefficients.tensors if n in together.common])
    return together.merged(coefficients, prepare)


# -- settings --------------------------------------------------------------------------------------
def _start(settings: Settings, names: Sequence[str]) -> float | Mapping[str, float] | Coefficients:
    if settings.init == "uniform":
        return 1.0 / len(names)
    if isinstance(settings.init, str):  # tuned: from the scale that scores best
        return 1.0 / len(names)
    if isinstance(settings.init, Mapping):
        for name in settings.init:
            if name not in names:
                near = nearest(str(name), names)
                raise RecipeError(
                    "a start is given for an expert that is not there",
                    key="init",
                    found=name,
                    expected=", ".join(names),
                    do=f"did you mean {near!r}?" if near else None,
                )
    return settings.init


def _prepared(prepare: Preparation, source: Stored, names: Sequence[str]) -> Preparation:
    """The preparation with what it must know of all tensors together."""
    if not prepare.overall:
        return prepare
    from merge.learning.threshold import thresholds

    return replace(prepare, thresholds=thresholds(source, names, prepare.value))


def _recalibrate(
    jobs: Sequence[Job], buffers: Sequence[str]
) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    from merge.learning.statistics import measured

    return lambda theta: measured(jobs, buffers, theta)


def _fingerprint(
    settings: Settings, objective: Objective, numbers: str, jobs: Sequence[Job]
) -> str:
    """A text that stands for all that a state of learning depends on; of data, for its sizes."""
    own = {
        f.name: repr(getattr(settings, f.name))
        for f in fields(settings)
        if f.name not in ("objective", "init", "memory", "keep")
    }
    init = settings.init
    own["init"] = init.to_json() if isinstance(init, Coefficients) else repr(init)
    function = getattr(objective, "function", None)
    kind = type(objective)
    plain = kind.__qualname__ if kind.__repr__ is object.__repr__ else repr(objective)
    own["objective"] = (
        plain if function is None else f"function {getattr(function, '__name__', '')}"
    )
    exact = settings.memory in ("resident", "stream")
    own["memory"] = "exact" if exact else settings.memory
    own["base and experts"] = numbers
    own["tasks"] = "; ".join(
        f"{job.name}: {job.learn.sizes}, {() if job.validate is None else job.validate.sizes}"
        for job in jobs
    )
    return json.dumps(own, sort_keys=True)


def _layer_of(name: str) -> str | None:
    found = place_of(name)
    return None if found is None else f"{found[0]}.{found[1]}".lstrip(".")
