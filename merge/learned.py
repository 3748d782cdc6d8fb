"""Coefficients learned for a recipe: its data opened, its words made settings, its state kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.analysis.named import function, is_function
from merge.coefficients import read_coefficients
from merge.errors import MergeError, RecipeError, nearest
from merge.ir.checkpoint import Checkpoint
from merge.learn import Learned, apply_coefficients, learn
from merge.learning.coefficients import Coefficients
from merge.learning.prepare import preparation
from merge.learning.settings import OBJECTIVES, settings_of
from merge.learning.state import Step
from merge.recipe.learned import COEFFICIENTS, Found
from merge.task_files import carried

if TYPE_CHECKING:
    from merge.analysis.task import Task
    from merge.recipe.learn_words import LearnEntry

__all__ = ["Learning", "Watch", "coefficients_of", "learn_recipe"]

Watch = Callable[[Step, int], None]
"""Called with each step, and how many there are."""


def learn_recipe(
    experts: Mapping[str, Checkpoint],
    base: Checkpoint,
    how: LearnEntry,
    start: Coefficients,
    seed: int,
    *,
    state: Path | None = None,
    fresh: bool = False,
    watch: Watch | None = None,
) -> Found:
    """The merge that ``learn:`` describes, and what was found.

    start: the coefficients as the recipe has them. state: where learning is kept, to be taken up
    unless ``fresh``.
    """
    given = {k: _frozen(k, v) for k, v in how.how.items()}
    given.setdefault("seed", seed)
    if how.objective is not None:
        given["objective"] = _objective(how.objective)
    settings = settings_of(how.preset, given)
    if "prepare" not in given and preparation(start.prepare).which != "none":
        given["prepare"] = start.prepare
        settings = settings_of(how.preset, given)
    alike = preparation(settings.prepare).which == preparation(start.prepare).which
    if how.init is not None and how.init != "recipe":
        given["init"] = how.init
    elif alike:
        given["init"] = _plain(start)
    tasks = _tasks(how, experts, base)
    if state is not None and fresh:
        state.unlink(missing_ok=True)
    settings = settings_of(how.preset, given)

    def tell(step: Step) -> None:
        if watch is not None:
            watch(step, settings.steps)

    try:
        found = learn(
            experts,
            base=base,
            tasks=tasks,
            preset=how.preset,
            state=state,
            progress=tell,
            **given,
        )
    except MergeError as error:
        if state is not None and state.exists():
            error.at(kept=state)
        raise
    return Found(
        found.checkpoint, frozenset(found.coefficients.tensors), _told(found), found.files()
    )


def coefficients_of(
    file: Path, tasks: Path | None, experts: Mapping[str, Checkpoint], base: Checkpoint
) -> Found:
    """The merge that a file of coefficients makes of these models, as `learn_recipe` returns it.

    tasks: the folder of what tasks have for themselves, which is written again as it is.
    """
    known = read_coefficients(file)
    merged = apply_coefficients(known, experts, base)
    told = f"coefficients of {file}"
    side: dict[str, bytes] = {}
    if tasks is not None:
        side = carried(tasks, known.tasks)
        told += f", and tensors of tasks' own of {tasks}"
    elif known.tasks:
        who = ", ".join(known.tasks)
        told += f"; what {who} had learned besides is not taken, since tasks: is not given"
        known = replace(known, tasks=())
    return Found(merged, frozenset(known.tensors), told, {COEFFICIENTS: known.to_json(), **side})


def _frozen(key: str, value: Any) -> Any:
    if key == "groups":
        return tuple((str(a), str(b)) for a, b in value)
    return tuple(value) if isinstance(value, list) else value


def _plain(start: Coefficients) -> Coefficients | dict[str, float]:
    """One number an expert where that is all there is."""
    rows = {block.values for block in start.blocks.values()}
    if len(rows) != 1:
        return start
    return {n: row[0] for n, row in zip(start.operands, rows.pop(), strict=True)}


def _objective(given: str | Mapping[str, Any]) -> Any:
    """An objective by name, by name with options, or a function of the user's own."""
    if isinstance(given, str):
        return function(given) if is_function(given) else given
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "kind"}
    kind = str(given.get("kind"))
    if kind not in OBJECTIVES:
        near = nearest(kind, OBJECTIVES)
        raise RecipeError(
            "there is no such objective",
            key="objective",
            found=kind,
            expected=f"kind: one of {', '.join(OBJECTIVES)}",
            do=f"did you mean {near!r}?" if near else None,
        )
    made: Any = OBJECTIVES[kind]()
    known = [f.name for f in fields(made) if f.name != "needs"]
    for key, value in options.items():
        if key not in known or not isinstance(value, int | float | str | tuple | None):
            near = nearest(key, known)
            raise RecipeError(
                f"the objective {kind} has no such option",
                key="objective",
                found=f"{key}: {value!r}",
                expected=", ".join(known) or "no options",
                do=f"did you mean {near!r}?" if near else None,
            )
    return replace(made, **options)


def _tasks(how: LearnEntry, experts: Mapping[str, Checkpoint], base: Checkpoint) -> dict[str, Task]:
    """The tasks by name, each run in its own expert's code, whose head it is judged with."""
    from merge.judging import open_tasks

    found: dict[str, Task] = {}
    for name, entry in (how.data or {}).items():
        own = experts.get(name)
        if own is None and name and len(how.data or {}) == len(experts):
            near = nearest(name, experts)
            if near is not None:
                raise RecipeError(
                    "data is given for a model that is not there",
                    task=name,
                    expected=", ".join(experts),
                    do=f"did you mean {near!r}?",
                )
        mine = {} if own is None else {name: own.roots}
        task = open_tasks({name: entry}, base.roots, mine)[0]
        found[name or task.name] = task
    return found


def _told(found: Learned) -> str:
    """The outcome in a line."""
    text = f"learned coefficients: {found.chosen} is the best of {len(found.scores)} candidates"
    scores = {c.name: c.score for c in found.scores}
    if found.chosen in scores:
        text += f", {scores[found.chosen]:.4f} on validation data"
        if "start" in scores:
            text += f" ({scores['start']:.4f} at the start)"
    if found.dead:
        text += f"; {len(found.dead)} tensors had no gradient, such as {found.dead[0]}"
    for task, value in found.temperatures.items():
        text += f"; temperature of {task} {value:.4g}"
    for own in found.own():
        text += f"; {own.task} has {len(own.learned)} learned tensors of its own"
    for task, count in found.skipped.items():
        if count:
            text += f"; {count} steps of {task} left out, their loss not finite"
    return "; ".join([text, *found.notes])


@dataclass(frozen=True, slots=True)
class Learning:
    """Where a recipe's learning is kept, who is told, and what is taken in its place.

    state: a file beside the output. near: the recipe's folder, in which its own file of
    coefficients is looked for first.
    """

    state: Path | None = None
    fresh: bool = False
    watch: Watch | None = None
    near: Path = Path()

    def __call__(
        self,
        experts: Mapping[str, Checkpoint],
        base: Checkpoint,
        how: LearnEntry,
        start: Coefficients,
        seed: int,
    ) -> Found:
        """As `learn_recipe`."""
        if how.coefficients is not None:
            tasks = None if how.tasks is None else self._beside(how.tasks)
            return coefficients_of(self._beside(how.coefficients), tasks, experts, base)
        return learn_recipe(
            experts,
            base,
            how,
            start,
            seed,
            state=self.state,
            fresh=self.fresh,
            watch=self.watch,
        )

    def _beside(self, name: str) -> Path:
        """What lies beside the recipe; else as it is called."""
        found = self.near / name
        return found if found.exists() else Path(name)
