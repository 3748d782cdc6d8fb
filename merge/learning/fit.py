"""The loop: gradients of the merged model on, coefficients moved, the merged model refreshed.

One step runs the merged model alone on a batch of each task, so that gradients add up on its
tensors; then every unit (tensors that share numbers) is gone through once: the inner product of
each part with the tensor's gradient, the optimiser's step on those few numbers, and the change
times the parts added to the tensor, in place, while the parts are still at hand. Where a unit's
parts together are more than a block, or the gradient is clipped by its norm, they are read twice.
The merged tensors are made anew every ``rebuild`` steps, so that rounding does not add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError, ScoreError
from merge.learning.batches import key_of, nbytes_of
from merge.learning.coefficients import BASE, Coefficients
from merge.learning.judge import Candidate, Judge
from merge.learning.latents import Latents
from merge.learning.layout import Layout, Unit
from merge.learning.network import Job, Network
from merge.learning.objectives import Objective
from merge.learning.parts import Part
from merge.learning.prepare import preparation
from merge.learning.settings import Settings
from merge.learning.state import State, Step
from merge.learning.store import Store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Fit", "Fitted"]

_BLOCK = 64 << 20
"""Bytes of a unit's parts that are held together; of larger ones there is one at a time."""

_PATIENCE = 20  # steps in a row without a finite loss of a task, after which it is an error


@dataclass(frozen=True, slots=True)
class Fitted:
    """What learning found: the chosen candidate, all that were scored, and how it went.

    free: for each task the tensors of its own that were learned. statistics: those measured anew.
    dead: tensors that never had a gradient. skipped: by task, steps whose loss was not finite.
    """

    chosen: Candidate
    trials: tuple[Candidate, ...]
    history: tuple[Step, ...]
    dead: tuple[str, ...]
    skipped: Mapping[str, int]
    free: Mapping[str, Mapping[str, Tensor]]
    statistics: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Fit:
    """One run of learning, over tasks that are settled.

    teacher: an expert's tensor, by its number and the tensor's name. fixed: coefficients of tensors
    that do not move. recalibrate: measures statistics anew on the tasks' data, by tensor. save:
    called with the state whenever it may be taken up from there, and when something stops the run.
    """

    jobs: Sequence[Job]
    store: Store
    layout: Layout
    latents: Latents
    settings: Settings
    objective: Objective
    teacher: Callable[[int, str], Tensor]
    fixed: dict[str, Tensor]
    fingerprint: str
    recalibrate: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    save: Callable[[State], None] | None = None
    progress: Callable[[Step], None] | None = None
    network: Network = field(init=False)
    judge: Judge = field(init=False)
    state: State = field(init=False)
    notes: list[str] = field(default_factory=list)
    _memory: dict[tuple[str, int], Any] = field(default_factory=dict)
    _held: int = 0
    _alive: dict[str, None] = field(default_factory=dict)
    _start: dict[str, Tensor] = field(default_factory=dict)
    _optimisers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    _barren: dict[str, int] = field(default_factory=dict)
    _safe: State | None = None

    def __post_init__(self) -> None:
        self.network = Network(self.store, self.layout.tensors, self.fixed)
        self.judge = Judge(self.jobs, self.objective)
        self.state = State(self.fingerprint, 0)

    def run(self, resume: State | None = None) -> Fitted:
        """Learn; from where ``resume`` stands, if it is given."""
        self._ask_experts()
        fresh = resume is None
        if fresh:
            self._score_simple()
        self._start = self.latents.snapshot()
        self._make_optimisers()
        if resume is not None:
            self._take_up(resume)
        self._build()
        if fresh:
            self._score("start" if "start" in self.settings.candidates else None)
        self._safe = self._snapshot()
        try:
            while self.state.step < self.settings.steps and not self._has_settled():
                self._one_step()
        except BaseException:
            if self.save is not None and self._safe is not None:
                self.save(self._with_best(self._safe))
            raise
        return self._finish()

    # -- before the first step -----------------------------------------------------------------
    def _ask_experts(self) -> None:
        """What each task's expert answers to its data: one pass, then the expert is dropped."""
        import torch

        needs = self.objective.needs == "expert" or type(self.objective).__name__ == "Own"
        for job in self.jobs:
            learns = needs and job.learn is not None and job.teacher is not None
            if self.objective.needs == "expert" and job.teacher is None:
                raise PlanError(
                    "a task has no expert to learn from",
                    task=job.name,
                    do="name the task as its expert, or take an objective that needs none",
                )
            judges = self.judge.wants_expert(job)
            if not (learns or judges):
                continue
            number = job.teacher
            assert number is not None
            self.network.load(partial(self.teacher, number))
            if judges:
                self.judge.learn_expert(job, self.network.theta)
            if learns and job.learn is not None:
                with torch.no_grad():
                    for i in range(len(job.learn)):
                        inputs, target = job.learn.batch(i)
                        view = job.view(
                            self.network.theta, inputs, target, layer=self.objective.layer
                        )
                        self._remember(job.name, i, self.objective.recall(view))

    def _remember(self, task: str, number: int, answer: Any) -> None:
        self._memory[task, number] = answer
        self._held += nbytes_of(answer)
        held = self._held
        if held > self.settings.keep:
            raise PlanError(
                "the experts' answers are more than is kept",
                task=task,
                found=f"{held} bytes after batch {number}",
                expected=f"at most {self.settings.keep} (keep)",
                do="learn from hard labels (objective: pseudo_labels), on less data, or raise keep",
            )

    def _score_simple(self) -> None:
        """The base, and task arithmetic at every scale; ``init: tuned`` starts from the best."""
        settings, names = self.settings, self.network.tensors
        tuned = settings.init == "tuned"
        if not self.judge:
            if tuned:
                raise PlanError(
                    "a scale cannot be tuned without validation data",
                    key="init",
                    found="tuned",
                    do="give tasks validate= batches, or start at a number",
                )
            self.notes.append("no validation data: nothing was compared, the last step is returned")
            return
        operands = [o for o in self.layout.operands if o != BASE]
        if "base" in settings.candidates or type(self.objective).__name__ == "Negation":
            self.network.load(self.store.source.base)
            base = Coefficients.uniform(operands, names, 0.0, seed=settings.seed)
            self._consider("base", base)
        best: tuple[float, float] | None = None
        prepared = str(self.store.prepare)
        for kind in dict.fromkeys(("none", prepared)):
            wanted = "task_arithmetic" in settings.candidates or (tuned and kind == prepared)
            if not wanted:
                continue
            label = "task arithmetic" if kind == "none" else kind
            for scale, theta in self._scaled(prepared=kind == prepared):
                coefficients = Coefficients.uniform(operands, names, scale, kind, settings.seed)
                found = self._consider(f"{label} at {scale:g}", coefficients, theta)
                if kind == prepared and found.allowed and (best is None or found.score > best[0]):
                    best = (found.score, scale)
        if tuned and best is not None:
            self.latents.restore(Latents(self.layout, best[1]).snapshot())
            self.notes.append(f"started at the best single scale, {best[1]:g}")

    def _scaled(self, prepared: bool) -> Iterator[tuple[float, Mapping[str, Tensor]]]:
        """Scales and the tensors ``origin + scale * sum of parts``, changed in place."""
        import torch

        theta = self.network.theta
        count = self.store.source.count
        with torch.no_grad():
            total: dict[str, Tensor] = {}
            for name in self.network.tensors:
                if prepared:
                    value = self.network.exact.origin(name)
                    if self.store.learns_base:
                        value = self.store.source.base(name)
                    parts: Iterator[Any] = iter(self.network.exact.parts(name))
                    total[name] = torch.zeros_like(value)
                    for i, part in enumerate(parts):
                        if i < count:
                            part.add_to(total[name], torch.ones(1, dtype=torch.float64), "whole")
                else:
                    value = self.store.source.base(name)
                    total[name] = torch.zeros_like(value)
                    for i in range(count):
                        total[name] += self.store.source.delta(i, name)
                self.network.put(name, value)
        at = 0.0
        negative = type(self.objective).__name__ == "Negation"
        for scale in self.settings.scales:
            scale = -scale if negative else scale
            with torch.no_grad():
                for name, sum_of_parts in total.items():
                    theta[name].add_(sum_of_parts, alpha=scale - at)
            at = scale
            yield scale, theta

    def _make_optimisers(self) -> None:
        import torch

        settings = self.settings
        kinds: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
            "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=settings.decay),
            "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=settings.decay),
            "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, weight_decay=settings.decay),
        }
        make = kinds[settings.optimiser]
        for unit in self._units():
            self._optimisers[f"unit/{unit.rows[0]}"] = make(
                self.latents.rows_of(unit), settings.rate
            )
        for job in self.jobs:
            if job.free:
                self._optimisers[f"free/{job.name}"] = make(
                    list(job.free.values()), settings.free_rate
                )

    def _units(self) -> list[Unit]:
        """Units with the tensors that move."""
        units = [
            Unit(u.rows, tuple(n for n in u.tensors if n not in self.fixed))
            for u in self.layout.units()
        ]
        return [u for u in units if u.tensors]

    def _build(self) -> None:
        """Make the merged tensors exactly, at the coefficients as they are now."""
        self.network.build(self._wanted(), self.layout.kinds)
        if self.recalibrate is not None:
            self._statistics()

    def _statistics(self) -> None:
        import torch

        assert self.recalibrate is not None
        with torch.no_grad():
            for name, value in self.recalibrate(self.network.theta).items():
                self.network.theta[name].copy_(value)

    def _wanted(self) -> dict[str, Tensor]:
        return self.network.wanted(self.latents, {**self.fixed, **self._dead()})

    def _dead(self) -> dict[str, Tensor]:
        """Tensors that have had no gradient in any step, with what they get instead."""
        import torch

        if self.state.step == 0:
            return {}
        out = {}
        for name in self.network.tensors:
            if name in self._alive or name in self.fixed:
                continue
            width = self.layout.width(name)
            count = len(self.layout.operands)
            if self.settings.dead == "init":
                out[name] = self._first[name]
                continue
            value = 0.0 if self.settings.dead == "zero" else 1.0 / self.store.source.count
            out[name] = torch.full((count, width), value, dtype=torch.float64)
            if self.layout.operands[-1] == BASE:
                out[name][-1] = 1.0
        return out

    # -- one step ------------------------------------------------------------------------------
    def _one_step(self) -> None:
        import torch

        settings, number = self.settings, self.state.step
        losses: dict[str, float] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_of(settings.seed, "step", number) % (1 << 63))
            for job in self.jobs:
                if job.learn is not None:
                    losses[job.name] = self._backward(job, number)
        rate = settings.rate * _factor(settings, number)
        units = self._units()
        for name in self.network.tensors:
            if self.network.theta[name].grad is not None:
                self._alive.setdefault(name)
        if settings.clip is None:
            for unit in units:
                self._update(unit, rate)
        else:
            self._update_clipped(units, rate, settings.clip)
        for job in self.jobs:
            if job.free:
                self._step_of(f"free/{job.name}", settings.free_rate * _factor(settings, number))
        for tensor in self.network.theta.values():
            tensor.grad = None
        self.state.step = number + 1
        self._after(losses)

    def _backward(self, job: Job, number: int) -> float:
        """The loss of one task's batch; its gradients are added to the tensors'."""
        assert job.learn is not None
        drawn = job.learn.drawn(self.settings.seed, number, self.settings.batch)
        remembered = (job.name, 0) in self._memory
        inputs, target, expert = job.learn.take(
            drawn, (lambda i: self._memory[job.name, i]) if remembered else None
        )
        if self.objective.needs == "labels" and target is None:
            raise PlanError(
                "a task has no labels, and the objective needs them",
                task=job.name,
                do="give train= batches with targets, or take an objective such as pseudo_labels",
            )
        view = job.view(self.network.theta, inputs, target, expert, self.objective.layer)
        loss = job.loss(self.objective, view)
        value = float(loss.detach())
        if not math.isfinite(value):
            self.state.skipped[job.name] = self.state.skipped.get(job.name, 0) + 1
            self._barren[job.name] = self._barren.get(job.name, 0) + 1
            if self._barren[job.name] >= _PATIENCE:
                raise ScoreError(
                    "a task's loss has not been a finite number for many steps in a row",
                    task=job.name,
                    found=f"{value} for {_PATIENCE} steps",
                    do="look for NaN or overflow in its data, or take a smaller rate",
                )
            return value
        self._barren[job.name] = 0
        if loss.requires_grad:
            (loss * job.weight).backward()  # type: ignore[no-untyped-call]
        return value

    def _gradients(self, unit: Unit, held: dict[str, list[Part]] | None) -> bool:
        """Pull the tensors' gradients back to the unit's rows; whether there were any.

        held: the parts are put there, for the update.
        """
        import torch

        found: dict[str, Tensor] = {}
        for name in unit.tensors:
            gradient = self.network.theta[name].grad
            if gradient is None:
                continue
            kind, width = self.layout.kinds[name], self.layout.width(name)
            rows = []
            for part in self.store.parts(name):
                rows.append(part.pull_back(gradient, kind, width))
                if held is not None:
                    held.setdefault(name, []).append(part)
            found[name] = torch.stack(rows)
        if not found:
            return False
        if not all(bool(torch.isfinite(g).all()) for g in found.values()):
            self.state.skipped["(gradient)"] = self.state.skipped.get("(gradient)", 0) + 1
            return False
        for row in self.latents.rows_of(unit):
            row.grad = None
        self.latents.pull_back(found)
        if self.settings.pull:
            with torch.no_grad():
                for name in self._names_of(unit):
                    row = self.latents.rows[name]
                    assert row.grad is not None
                    row.grad += 2 * self.settings.pull * (row - self._start[name])
        return True

    def _names_of(self, unit: Unit) -> list[str]:
        leaves = {id(t) for t in self.latents.rows_of(unit)}
        return [n for n, t in self.latents.rows.items() if id(t) in leaves and t.grad is not None]

    def _update(self, unit: Unit, rate: float) -> None:
        """Gradient, step and refresh of one unit; its parts are read once where they fit."""
        held: dict[str, list[Part]] | None = {} if self._fits(unit) else None
        if self._gradients(unit, held):
            self._step_of(f"unit/{unit.rows[0]}", rate)
            self.latents.project(unit)
            self._refresh(unit, held)
        for name in unit.tensors:
            self.network.theta[name].grad = None

    def _update_clipped(self, units: Sequence[Unit], rate: float, clip: float) -> None:
        """The same with the norm of all rows' gradients bounded: every part is read twice."""
        import torch

        moved = [u for u in units if self._gradients(u, None)]
        leaves = {id(t): t for u in moved for t in self.latents.rows_of(u) if t.grad is not None}
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), clip)
        for unit in moved:
            self._step_of(f"unit/{unit.rows[0]}", rate)
            self.latents.project(unit)
            self._refresh(unit, None)

    def _fits(self, unit: Unit) -> bool:
        """Whether the parts of a unit may be held together while they are not kept anyway."""
        if all(self.store.keeps(n) for n in unit.tensors):
            return False
        size = sum(self.network.theta[n].nbytes for n in unit.tensors)
        return size * len(self.layout.operands) <= _BLOCK

    def _refresh(self, unit: Unit, held: dict[str, list[Part]] | None) -> None:
        """Bring the unit's tensors to its new coefficients."""
        import torch

        for name in unit.tensors:
            if name not in self._alive:
                continue
            with torch.no_grad():
                wanted = self.latents.coefficients_of(name).detach()
            if torch.equal(wanted, self.network.applied[name]):
                continue
            known = None if held is None else held.get(name)
            parts = self.store.parts(name) if known is None else known
            self.network.move(name, wanted, parts, self.layout.kinds[name])

    def _step_of(self, key: str, rate: float) -> None:
        optimiser = self._optimisers[key]
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        if key.startswith("free/"):
            optimiser.zero_grad(set_to_none=True)

    # -- between steps -------------------------------------------------------------------------
    def _after(self, losses: Mapping[str, float]) -> None:
        """Rebuild, score, note and save what is due after a step."""
        number, settings = self.state.step, self.settings
        if number == 1:  # now it is known which tensors have no gradient
            self._settle_dead()
        last = number == settings.steps
        scored = bool(self.judge) and (number % settings.every == 0 or last)
        rounded = self.network.exact is not self.store
        if number % settings.rebuild == 0 or last or (scored and rounded):
            self._build()
        score = None
        if scored:
            if self.recalibrate is not None:
                self._statistics()
            score = self._score(f"step {number}")
        step = Step(number, losses, score)
        self.state.history = (*self.state.history, step)
        if number % settings.rebuild == 0 or last:
            self._safe = self._snapshot()
            if self.save is not None:
                self.save(self._safe)
        if self.progress is not None:
            self.progress(step)

    def _settle_dead(self) -> None:
        import torch

        for name, wanted in self._dead().items():
            if not torch.equal(wanted, self.network.applied[name]):
                parts = self.store.parts(name)
                self.network.move(name, wanted, parts, self.layout.kinds[name])

    def _score(self, name: str | None) -> float | None:
        """Score the merged tensors as they are now, and keep them if they are the best."""
        if name is None or not self.judge:
            return None
        found = self.judge.candidate(name, self.network.theta)
        if self._is_best(found):
            self._set_best(replace(found, coefficients=self._coefficients()))
        self.state.trials = (*self.state.trials, found)
        return found.score

    def _consider(
        self, name: str, coefficients: Coefficients, theta: Mapping[str, Tensor] | None = None
    ) -> Candidate:
        found = self.judge.candidate(name, self.network.theta if theta is None else theta)
        if self._is_best(found):
            self._set_best(replace(found, coefficients=coefficients))
        self.state.trials = (*self.state.trials, found)
        return found

    def _is_best(self, found: Candidate) -> bool:
        best = self.state.best
        return found.allowed and (best is None or not best.allowed or found.score > best.score)

    def _set_best(self, candidate: Candidate) -> None:
        self.state.best = candidate
        kept = {n: t for n, t in self.state.tensors.items() if not n.startswith("best/")}
        self.state.tensors = {**kept, **{f"best/{n}": t for n, t in self._free().items()}}

    def _free(self) -> dict[str, Tensor]:
        return {
            f"{job.name}/{n}": t.detach().clone() for job in self.jobs for n, t in job.free.items()
        }

    def _has_settled(self) -> bool:
        """Whether scores have not gained for as long as patience goes."""
        if self.settings.patience is None:
            return False
        scored = [s.score for s in self.state.history if s.score is not None]
        late = scored[-self.settings.patience :]
        early = scored[: -self.settings.patience]
        return bool(early) and len(late) == self.settings.patience and max(late) <= max(early)

    def _coefficients(self) -> Coefficients:
        return self.latents.coefficients(
            {**self.fixed, **self._dead()}, str(self.store.prepare), self.settings.seed
        )

    # -- states --------------------------------------------------------------------------------
    def _snapshot(self) -> State:
        """A copy of everything that the next step depends on."""
        tensors = {f"row/{n}": t for n, t in self.latents.snapshot().items()}
        tensors |= {f"free/{n}": t for n, t in self._free().items()}
        for key, optimiser in enumerate(self._optimisers.values()):
            for i, moments in optimiser.state_dict()["state"].items():
                tensors |= {
                    f"moment/{key}/{i}/{word}": value.detach().clone()
                    for word, value in moments.items()
                    if value is not None
                }
        tensors |= {n: t for n, t in self.state.tensors.items() if n.startswith("best/")}
        return replace_state(self.state, tensors, tuple(self._alive))

    def _with_best(self, safe: State) -> State:
        """An earlier snapshot with what has been found to be best since."""
        kept = {n: t for n, t in safe.tensors.items() if not n.startswith("best/")}
        best = {n: t for n, t in self.state.tensors.items() if n.startswith("best/")}
        safe.tensors, safe.best = {**kept, **best}, self.state.best
        return safe

    def _take_up(self, state: State) -> None:
        import torch

        self.state = replace_state(state, dict(state.tensors), state.alive)
        self._alive = dict.fromkeys(state.alive)
        self.latents.restore(_under(state.tensors, "row/"))
        with torch.no_grad():
            for job in self.jobs:
                for name, value in job.free.items():
                    value.copy_(state.tensors[f"free/{job.name}/{name}"])
        for key, optimiser in enumerate(self._optimisers.values()):
            document = optimiser.state_dict()
            found: dict[int, dict[str, Tensor]] = {}
            for path, value in _under(state.tensors, f"moment/{key}/").items():
                number, _, word = path.partition("/")
                found.setdefault(int(number), {})[word] = value.clone()
            document["state"] = found
            optimiser.load_state_dict(document)

    def _finish(self) -> Fitted:
        dead = tuple(
            n for n in self.network.tensors if n not in self._alive and n not in self.fixed
        )
        best = self.state.best
        if best is None:
            best = Candidate("last step", math.nan, {}, True, self._coefficients())
            free = self._free()
        else:
            free = _under(self.state.tensors, "best/")
        by_task = {
            job.name: {n: free[f"{job.name}/{n}"] for n in job.free}
            for job in self.jobs
            if job.free
        }
        return Fitted(
            best,
            self.state.trials,
            self.state.history,
            dead,
            dict(self.state.skipped),
            by_task,
            self._measured(best),
            tuple(self.notes),
        )

    def _measured(self, chosen: Candidate) -> dict[str, Tensor]:
        """The statistics of the chosen merge, where they are to be measured."""
        import torch

        if self.recalibrate is None or chosen.coefficients is None or chosen.name == "base":
            return {}
        known = chosen.coefficients
        plain = known.prepare != str(self.store.prepare)
        store = Store(self.store.source, preparation("none")) if plain else self.store
        network = Network(store, self.network.tensors, self.fixed)
        network.theta = self.network.theta
        wanted = {
            n: torch.tensor(known.block_of(n).values, dtype=torch.float64) for n in network.tensors
        }
        count = len(self.layout.operands)
        wanted = {
            n: w if len(w) == count else torch.cat([w, torch.ones(1, w.shape[1]).double()])
            for n, w in wanted.items()
        }
        network.build(wanted, {n: known.block_of(n).kind for n in network.tensors})
        return dict(self.recalibrate(network.theta))

    @property
    def _first(self) -> dict[str, Tensor]:
        """Coefficients at the start."""
        import torch

        now = self.latents.snapshot()
        self.latents.restore(self._start)
        with torch.no_grad():
            found = {
                n: self.latents.coefficients_of(n).detach().clone() for n in self.network.tensors
            }
        self.latents.restore(now)
        return found


def replace_state(state: State, tensors: dict[str, Tensor], alive: tuple[str, ...]) -> State:
    """A state with other tensors, whose other parts are copies."""
    return State(
        state.settings,
        state.step,
        tensors,
        alive,
        state.trials,
        state.best,
        state.history,
        dict(state.skipped),
    )


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


def _factor(settings: Settings, step: int) -> float:
    """What the schedule makes of the rate in a step, counted from 0."""
    if settings.schedule == "linear":
        return 1.0 - step / max(1, settings.steps)
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / max(1, settings.steps)))
    return 1.0
