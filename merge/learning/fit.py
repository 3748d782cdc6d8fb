"""The loop: a batch of each task through the merged model, coefficients moved, what is due then.

One step runs the merged model alone, so that the gradients of all tasks add up on its tensors; what
then becomes of them is `merge.learning.mover`'s. The merged tensors are made anew every ``rebuild``
steps, so that rounding does not add up, and a run can be taken up there to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from merge.errors import MergeError, PlanError, ScoreError, SinkError
from merge.learning.answers import Answers
from merge.learning.batches import key_of
from merge.learning.coefficients import BASE
from merge.learning.contest import Contest
from merge.learning.judge import Candidate, Judge
from merge.learning.latents import Latents
from merge.learning.mover import Mover, under
from merge.learning.network import Job, Network
from merge.learning.objectives import Objective
from merge.learning.prepare import preparation
from merge.learning.settings import Settings
from merge.learning.state import State, Step
from merge.learning.store import Store

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fit", "Fitted"]

_BARREN = 20  # steps in a row without a finite loss of a task, after which it is an error

Statistics = Callable[[Mapping[str, "Tensor"]], Mapping[str, "Tensor"]]


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
    latents: Latents
    settings: Settings
    objective: Objective
    teacher: Callable[[int, str], Tensor]
    fixed: Mapping[str, Tensor]
    fingerprint: str
    recalibrate: Statistics | None = None
    save: Callable[[State], None] | None = None
    progress: Callable[[Step], None] | None = None
    network: Network = field(init=False)
    mover: Mover = field(init=False)
    contest: Contest = field(init=False)
    answers: Answers = field(init=False)
    history: list[Step] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    done: int = 0
    _barren: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = self.latents.layout
        self.network = Network(self.store, layout.tensors, self.fixed)
        self.mover = Mover(self.network, self.latents, self.settings, self.fixed, self.jobs)
        experts = tuple(o for o in layout.operands if o != BASE)
        judge = Judge(self.jobs, self.objective)
        measure = None if self.recalibrate is None else self._measure
        self.contest = Contest(judge, self.network, self.settings, experts, measure)
        self.answers = Answers(self.objective, self.settings.keep)

    def run(self, resume: State | None = None) -> Fitted:
        """Learn; from where ``resume`` stands, if it is given."""
        self.answers.ask(self.jobs, self.contest.judge, self.network, self.teacher)
        self.notes += self.answers.notes
        if resume is None:
            self._compare_simple()
        else:
            self.latents.restore(under(resume.tensors, "start/"))
        self.mover.begin()
        if resume is not None:
            self._take_up(resume)
        self._build()
        if resume is None and self.contest.judge and "start" in self.settings.candidates:
            self._score("start")
        safe = self._state()
        try:
            while self.done < self.settings.steps and not self._has_settled():
                if (reached := self._one_step()) is not None:
                    safe = reached
        except BaseException as error:
            self._rescue(safe, error)
            raise
        return self._finish()

    def _compare_simple(self) -> None:
        """Score what needs no learning; ``init: tuned`` starts from the best scale."""
        tuned = self.settings.init == "tuned"
        if not self.contest.judge:
            if tuned:
                raise PlanError(
                    "a scale cannot be tuned without validation data",
                    key="init",
                    found="tuned",
                    do="give tasks validate= batches, or start at a number",
                )
            self.notes.append("no validation data: nothing was compared, the last step is returned")
            return
        scale = self.contest.enter_simple(self.mover.free())
        if tuned and scale is not None:
            self.latents.restore(Latents(self.latents.layout, scale).snapshot())
            self.notes.append(f"started at the best single scale, {scale:g}")

    # -- one step ------------------------------------------------------------------------------
    def _one_step(self) -> State | None:
        """One step and what is due after it; the state, where the run may be taken up from it."""
        import torch

        losses: dict[str, float] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_of(self.settings.seed, "step", self.done))
            for job in self.jobs:
                losses[job.name] = self._backward(job)
        lost = self.mover.step(self.done)
        if lost:
            self.skipped["(gradient)"] = self.skipped.get("(gradient)", 0) + lost
        self.done += 1
        number, settings = self.done, self.settings
        last = number == settings.steps
        scored = bool(self.contest.judge) and (number % settings.every == 0 or last)
        rounded = self.network.exact is not self.store
        safe = number % settings.rebuild == 0 or last
        if safe or (scored and rounded):
            self._build()
        step = Step(number, losses, self._score(f"step {number}") if scored else None)
        self.history.append(step)
        state = self._state() if safe else None
        if state is not None and self.save is not None:
            self.save(state)
        if self.progress is not None:
            self.progress(step)
        return state

    def _backward(self, job: Job) -> float:
        """The loss of one task's batch; its gradients are added to the tensors'."""
        drawn = job.learn.drawn(self.settings.seed, self.done, self.settings.batch)
        inputs, target, expert = job.learn.take(drawn, self.answers.of(job))
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
            self.skipped[job.name] = self.skipped.get(job.name, 0) + 1
            self._barren[job.name] = self._barren.get(job.name, 0) + 1
            if self._barren[job.name] >= _BARREN:
                raise ScoreError(
                    "a task's loss has not been a finite number for many steps in a row",
                    task=job.name,
                    found=f"{value} for {_BARREN} steps",
                    do="look for NaN or overflow in its data, or take a smaller rate",
                )
            return value
        self._barren[job.name] = 0
        if loss.requires_grad:
            (loss * job.weight).backward()  # type: ignore[no-untyped-call]
        return value

    def _build(self) -> None:
        """Make the merged tensors exactly, at the coefficients as they are now."""
        self.network.build(self.mover.wanted(), self.latents.layout.kinds)
        if self.recalibrate is not None:
            self._measure()

    def _measure(self) -> None:
        import torch

        assert self.recalibrate is not None
        with torch.no_grad():
            for name, value in self.recalibrate(self.network.theta).items():
                self.network.theta[name].copy_(value)

    def _score(self, name: str) -> float:
        return self.contest.enter(name, self.mover.coefficients, self.mover.free()).score

    def _has_settled(self) -> bool:
        """Whether scores have not gained for as long as patience goes."""
        patience = self.settings.patience
        scored = [s.score for s in self.history if s.score is not None]
        if patience is None or len(scored) <= patience:
            return False
        return max(scored[-patience:]) <= max(scored[:-patience])

    # -- states --------------------------------------------------------------------------------
    def _rescue(self, safe: State, error: BaseException) -> None:
        """Save what was found when something stops the run; where that fails, too, it is told."""
        if self.save is None or isinstance(error, SinkError):  # it was the state that failed
            return
        try:
            self.save(self._with_best(safe))
        except SinkError as lost:
            error.add_note(str(lost))
            if isinstance(error, MergeError):
                error.at(lost=f"{lost.what}: {lost.found}")

    def _state(self) -> State:
        """A copy of everything that the next step depends on."""
        tensors = self.mover.saved()
        tensors |= {f"start/{n}": t for n, t in self.mover.start.items()}
        state = State(
            self.fingerprint,
            self.done,
            tensors,
            tuple(self.mover.alive),
            tuple(self.contest.trials),
            history=tuple(self.history),
            skipped=dict(self.skipped),
        )
        return self._with_best(state)

    def _with_best(self, state: State) -> State:
        """The state with what is the best by now."""
        kept = {n: t for n, t in state.tensors.items() if not n.startswith("best/")}
        best = {f"best/{n}": t for n, t in self.contest.free.items()}
        return replace(state, tensors={**kept, **best}, best=self.contest.best)

    def _take_up(self, state: State) -> None:
        self.done = state.step
        self.history, self.skipped = list(state.history), dict(state.skipped)
        self.contest.trials, self.contest.best = list(state.trials), state.best
        self.contest.free = under(state.tensors, "best/")
        self.contest.judge.settle(state.trials)
        self.mover.take_up(state.tensors, state.alive, state.step > 0)

    def _finish(self) -> Fitted:
        best, free = self.contest.best, self.contest.free
        if best is None:
            best = Candidate("last step", math.nan, {}, True, self.mover.coefficients())
            free = self.mover.free()
        learned = [job for job in self.jobs if job.free]
        return Fitted(
            best,
            tuple(self.contest.trials),
            tuple(self.history),
            self.mover.dead(),
            dict(self.skipped),
            {job.name: {n: free[f"{job.name}/{n}"] for n in job.free} for job in learned},
            self._measured(best),
            tuple(self.notes),
        )

    def _measured(self, chosen: Candidate) -> Mapping[str, Tensor]:
        """The statistics of the chosen merge, where they are to be measured."""
        import torch

        known = chosen.coefficients
        if self.recalibrate is None or known is None or chosen.name == "base":
            return {}
        plain = known.prepare != str(self.store.prepare)
        store = Store(self.store.source, preparation("none")) if plain else self.store
        network = Network(store, self.network.tensors, self.fixed)
        network.theta = self.network.theta
        count = len(self.latents.layout.operands) if store.learns_base else store.source.count
        wanted = {}
        for name in network.tensors:
            rows = torch.tensor(known.block_of(name).values, dtype=torch.float64)
            own = torch.ones(count - len(rows), rows.shape[1], dtype=torch.float64)
            wanted[name] = torch.cat([rows, own])
        network.build(wanted, {n: known.block_of(n).kind for n in network.tensors})
        return dict(self.recalibrate(network.theta))
