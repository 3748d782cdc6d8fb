"""A recipe from its file to its output: planned with card and lock file, then computed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from merge import run
from merge.errors import OutputRefused
from merge.ir.align import Missing
from merge.ir.checkpoint import Checkpoint
from merge.plan import parse_bytes
from merge.plan.model import Plan, SideOutput, side_output
from merge.run import SHARD_SIZE, PlanOptions, Saved, WriteOptions, check_target, save_plan
from merge.write.card import CARD
from merge.write.licence import check_identifier

if TYPE_CHECKING:
    from merge.chosen import Chosen
    from merge.learning.search import Trial
    from merge.learning.state import Step
    from merge.recipe.compile import Compiled
    from merge.recipe.explain import Made
    from merge.recipe.locked import Locked
    from merge.recipe.read import Recipe

__all__ = ["Planned", "apply_plan", "beside_of", "plan_recipe"]

_STATE = "learn.safetensors"
"""Beside an output: how far learning has come."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A recipe that is ready to run. stages: folders of stages to be written too, with plans.

    extract: where the result is to be an adapter, what computes its factors and gives the plan of
    its folder; ``plan`` then says what is read for it. beside: files beside the output that hold
    what was found so far, and go once it is there.
    """

    plan: Plan
    stages: tuple[tuple[Path, Plan], ...]
    compiled: Compiled
    extract: Callable[[Callable[[int], None] | None], Plan] | None = None
    beside: tuple[Path, ...] = ()

    def targets(self, out: Path) -> list[tuple[Path, Plan]]:
        """The folders that are written, with their plans: kept stages first."""
        return [*self.stages, (out, self.plan)]


def plan_recipe(
    path: str | Path,
    *,
    seed: int | None = None,
    dtype: str | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    shard_size: int | str = SHARD_SIZE,
    lenient: bool = False,
    settings: Sequence[str] = (),
    missing: Missing | None = None,
    card: bool = True,
    licence: str | None = None,
    allow_pickle: bool = False,
    copy_code: bool = False,
    compute: bool = True,
    in_memory: bool = False,
    out: str | Path | None = None,
    fresh: bool = False,
    watch: Callable[[Trial], None] | None = None,
    learning: Callable[[Step, int], None] | None = None,
    coefficients: str | Path | None = None,
) -> Planned:
    """The recipe file ``path`` planned; the recipe is copied into the output, with a lock file.

    path: a recipe, or the lock file of an output, whose options count where none are given.
    dtype: overrides the recipe's. lenient: unknown keys are noted and ignored. settings:
    ``key=value`` texts that override recipe values; missing: one of them, for the key of that name.
    card, licence, allow_pickle, copy_code: as in `merge.apply`. compute: alignments and repairs,
    which read weights, and searches; without it the plan is of the models as they are. in_memory:
    for a result that is published without a local copy. out: where the result will be: beside it a
    search, or learning, keeps what it has found, and takes it up unless ``fresh``. watch: called
    with each trial of a search; learning: with each step, and how many there are. coefficients: a
    file of them, in the place of what ``learn:`` would learn.
    """
    from merge.card import command
    from merge.checkpoint import open_checkpoint
    from merge.recipe.compile import compile_recipe
    from merge.recipe.learned import TASKS
    from merge.recipe.locked import Locked
    from merge.recipe.resolved import with_coefficients

    if coefficients is not None:
        settings = (*settings, _learned_before(Path(coefficients).resolve()))
    if missing is not None:
        settings = (*settings, f"missing={missing}")
    locked = Locked.of(
        Path(path),
        partial(open_checkpoint, allow_pickle=allow_pickle),
        settings,
        seed=seed,
        dtype=dtype,
        shard_size=None if _is_usual(shard_size) else str(shard_size),
        lenient=lenient,
        license=licence if licence is None else check_identifier(licence),
    )
    seed, dtype, licence = locked.number("seed"), locked.text("dtype"), locked.text("license")
    lenient, shard_size = locked.flag("lenient"), locked.text("shard_size") or SHARD_SIZE
    options = PlanOptions(memory, threads, device, shard_size, card, copy_code)
    steps = None
    if compute:
        from merge.learned import Learning
        from merge.steps import RecipeSteps

        state = None if out is None else beside_of(out, _STATE)
        steps = RecipeSteps(Learning(state, fresh, learning, Path(path).parent))
    chosen = None
    if any(stage.model.tune is not None for stage in locked.recipe.stages):
        from merge.chosen import choose

        chosen = choose(locked.recipe, locked.open, steps, seed, options, out, fresh, watch)
        locked = replace(locked, recipe=chosen.recipe)
    recipe, settings = locked.recipe, locked.recipe.settings
    compiled = compile_recipe(recipe, locked.open, seed=seed, steps=steps)
    if not compute:
        from merge.task_plan import tasks_told

        lines = [line for m in compiled.made for line in tasks_told(m, locked.opened)]
        compiled = replace(compiled, notes=(*compiled.notes, *lines))
    learned = _learned(compiled)
    if learned:
        if coefficients is None:
            locked.check_learned(learned[0].side)
        own = any(name.startswith(f"{TASKS}/") for name in learned[0].side)
        if own and learned[0].stage is not locked.recipe.final:
            inner = (
                f"what is in {TASKS}/ was learned for stage {learned[0].stage.name!r}, which the"
                " result is not: save that stage to use it"
            )
            compiled = replace(compiled, notes=(*compiled.notes, inner))
        recipe = with_coefficients(recipe, learned[0].stage, tasks=own)
        locked, settings = replace(locked, recipe=recipe), ()
    kind = run.device_of(device).partition(":")[0]
    again = command(
        settings,
        seed=seed,
        dtype=dtype,
        shard_size=None if _is_usual(shard_size) else shard_size,
        device=None if kind == "cpu" else kind,
        lenient=lenient,
        allow_pickle=allow_pickle,
        copy_code=copy_code,
        license=licence,
    )
    outputs = _Outputs(recipe, locked, compiled, chosen, dtype, licence, again, options)
    beside = () if chosen is None else chosen.beside
    if learned and out is not None:
        beside = (*beside, beside_of(out, _STATE))
    return replace(outputs.planned(in_memory), beside=beside)


def _learned_before(file: Path) -> str:
    """The setting that takes the coefficients in ``file``, and what tasks have beside it."""
    from merge.recipe.learned import TASKS

    said = {"coefficients": str(file)}
    if any((file.parent / TASKS).glob("*/task.json")):
        said["tasks"] = str(file.parent / TASKS)
    return f"learn={json.dumps(said)}"


def _is_usual(shard_size: int | str) -> bool:
    return parse_bytes(shard_size) == parse_bytes(SHARD_SIZE)


@dataclass(frozen=True, slots=True, eq=False)
class _Outputs:
    """What a compiled recipe writes: plans of its result and of the stages that it keeps.

    again: the command that makes the same, for the card.
    """

    recipe: Recipe
    locked: Locked
    compiled: Compiled
    chosen: Chosen | None
    dtype: str | None
    licence: str | None
    again: str
    options: PlanOptions

    def planned(self, in_memory: bool) -> Planned:
        """Everything planned. in_memory: the result, which is published without a local copy."""
        compiled = self.compiled
        last = compiled.made[-1]
        extract = None
        if compiled.base is None:
            main = self.plan(compiled.checkpoint, last, in_memory)
        else:
            from merge.extraction import output_of

            adapter = output_of(
                compiled.checkpoint, compiled.base, self.recipe.final.model, self.dtype
            )
            main = adapter.plan(self.options)

            def extract(progress: Callable[[int], None] | None) -> Plan:
                made = adapter.extracted(self.options, progress).checkpoint
                return self.plan(made, last, in_memory)

        told = () if self.chosen is None else self.chosen.notes
        main = replace(main, notes=(*told, *compiled.notes, *main.notes))
        by_folder = {m.stage.model.save: m for m in compiled.made[:-1]}
        stages = tuple(
            (Path(folder), self.plan(stage, by_folder[folder])) for folder, stage in compiled.saved
        )
        return Planned(main, stages, compiled, extract)

    def plan(self, checkpoint: Checkpoint, by: Made, in_memory: bool = False) -> Plan:
        """The plan of what one stage makes."""
        from merge.card import recipe_card

        result = checkpoint if self.dtype is None else checkpoint.cast(self.dtype)
        extra = self._side(by)
        notes: tuple[str, ...] = ()
        if self.options.card:
            text, notes = recipe_card(
                self.recipe, self.compiled.made, by, result, self.again, self.licence
            )
            extra.append(SideOutput(CARD, text=text))
        options = replace(self.options, card=False, in_memory=in_memory)
        planned = run.plan(result, options, extra=extra)
        return replace(planned, notes=(*notes, *planned.notes))

    def _side(self, by: Made) -> list[SideOutput]:
        """The recipe, and what was found on the way; with the last stage's output the lock file."""
        from merge import __version__
        from merge.recipe.pinned import LOCK

        learned = _learned(self.compiled)
        found = [SideOutput("merge_recipe.yml", text=self.recipe.text)]
        if by is self.compiled.made[-1]:
            lock = self.locked.written(__version__, learned[0].side if learned else {})
            found.append(SideOutput(LOCK, text=lock))
            found += () if self.chosen is None else self.chosen.side
        return found + [side_output(*item) for m in learned for item in m.side.items()]


def _learned(compiled: Compiled) -> list[Made]:
    """The stages whose coefficients are learned."""
    from merge.recipe.learned import COEFFICIENTS

    return [m for m in compiled.made if COEFFICIENTS in m.side]


def beside_of(out: str | Path, ending: str) -> Path:
    """A file beside an output, for what is found on the way to it."""
    place = Path(out)
    here = place if place.name else Path(os.path.abspath(place))
    return here.with_name(f"{here.name}.{ending}")


def apply_plan(planned: Planned, out: Path, how: WriteOptions = WriteOptions()) -> Saved:
    """Compute a recipe into the folder ``out``, and the stages it keeps into theirs, first."""
    targets = planned.targets(out)
    places = [folder.resolve() for folder, _ in targets]
    if len(set(places)) < len(places):
        raise OutputRefused(
            "two stages would be written into one folder",
            found=", ".join(str(folder) for folder, _ in targets),
            do="give every stage that is saved a folder of its own",
        )
    if planned.extract is not None:  # which is long work
        from merge.write.target import check_unused

        check_target(planned.plan, out)
        check_unused(out, replace=how.replace)
    for folder, stage in planned.stages:
        save_plan(stage, folder, how)
    plan = planned.plan if planned.extract is None else planned.extract(how.progress)
    saved = save_plan(plan, out, how)
    for file in planned.beside:  # the output itself tells it now
        file.unlink(missing_ok=True)
    return saved
