"""From a checkpoint to its bytes: plan, engine and sink joined. `Checkpoint`'s verbs end here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import OutputRefused, PlanError
from merge.families.reconcile import reconcile
from merge.ir.align import Missing
from merge.ir.checkpoint import Checkpoint
from merge.plan import make_plan, parse_bytes
from merge.plan.model import Plan, SideOutput, side_output
from merge.write.card import CARD
from merge.write.licence import check_identifier

if TYPE_CHECKING:
    import torch

    from merge.engine.execute import Report
    from merge.engine.finite import Policy
    from merge.learning.search import Trial
    from merge.learning.state import Step
    from merge.recipe.compile import Compiled
    from merge.recipe.explain import Made

__all__ = [
    "Planned",
    "Saved",
    "apply_plan",
    "check_target",
    "plan",
    "plan_recipe",
    "push",
    "reconcile",
    "save",
    "save_plan",
    "state_dict",
]


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished output. ``report`` is None when it was there already, complete and verified."""

    path: Path
    plan: Plan
    report: Report | None


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


def plan(
    checkpoint: Checkpoint,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    shard_size: int | str = "5GB",
    card: bool = True,
    copy_code: bool = False,
    extra: Iterable[SideOutput] = (),
    in_memory: bool = False,
) -> Plan:
    """The plan of ``checkpoint``; sizes may be text such as "256MiB".

    card: with a README.md. copy_code: whether programs that came with the model are copied into the
    output. in_memory: for weight files that are published without a local copy.
    """
    if copy_code:
        checkpoint = replace(checkpoint, side=checkpoint.side.with_code())
    notes: tuple[str, ...] = ()
    if card:
        from merge.card import checkpoint_card

        text, notes = checkpoint_card(checkpoint)
        extra = [*extra, SideOutput(CARD, text=text)]
    made = make_plan(
        checkpoint,
        memory=None if memory is None else parse_bytes(memory),
        threads=threads,
        device=_device(device),
        shard_size=parse_bytes(shard_size),
        extra=extra,
        in_memory=in_memory,
    )
    return replace(made, notes=(*notes, *made.notes))


def plan_recipe(
    path: str | Path,
    *,
    seed: int | None = None,
    dtype: str | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    shard_size: int | str = "5GB",
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
    from merge import __version__
    from merge.card import command, recipe_card
    from merge.checkpoint import open_checkpoint
    from merge.recipe.compile import compile_recipe
    from merge.recipe.learned import COEFFICIENTS, TASKS
    from merge.recipe.locked import Locked
    from merge.recipe.pinned import LOCK
    from merge.recipe.resolved import with_coefficients

    if coefficients is not None:
        file = Path(coefficients).resolve()
        said = {"coefficients": str(file)}
        if any((file.parent / TASKS).glob("*/task.json")):
            said["tasks"] = str(file.parent / TASKS)
        settings = (*settings, f"learn={json.dumps(said)}")
    if missing is not None:
        settings = (*settings, f"missing={missing}")
    locked = Locked.of(
        Path(path),
        partial(open_checkpoint, allow_pickle=allow_pickle),
        settings,
        seed=seed,
        dtype=dtype,
        shard_size=None if parse_bytes(shard_size) == parse_bytes("5GB") else str(shard_size),
        lenient=lenient,
        license=licence if licence is None else check_identifier(licence),
    )
    seed, dtype, licence = locked.number("seed"), locked.text("dtype"), locked.text("license")
    lenient, shard_size = locked.flag("lenient"), locked.text("shard_size") or "5GB"
    steps = None
    if compute:
        from merge.aligning import RecipeSteps
        from merge.learned import Learning

        state = None if out is None else beside_of(out, "learn.safetensors")
        steps = RecipeSteps(Learning(state, fresh, learning, Path(path).parent))
    chosen = None
    if any(stage.model.tune is not None for stage in locked.recipe.stages):
        from merge.chosen import choose

        work: dict[str, Any] = {"memory": memory, "threads": threads, "device": device}
        chosen = choose(locked.recipe, locked.open, steps, seed, work, out, fresh, watch)
        locked = replace(locked, recipe=chosen.recipe)
    recipe, settings = locked.recipe, locked.recipe.settings
    compiled = compile_recipe(recipe, locked.open, seed=seed, steps=steps)
    if not compute:
        from merge.task_plan import tasks_told

        lines = [line for m in compiled.made for line in tasks_told(m, locked.opened)]
        compiled = replace(compiled, notes=(*compiled.notes, *lines))
    learned = [m for m in compiled.made if COEFFICIENTS in m.side]
    if learned and coefficients is None:
        locked.check_learned(learned[0].side)
    if learned:
        own = any(name.startswith(f"{TASKS}/") for name in learned[0].side)
        if own and learned[0].stage is not locked.recipe.final:
            inner = (
                f"what is in {TASKS}/ was learned for stage {learned[0].stage.name!r}, which the"
                " result is not: save that stage to use it"
            )
            compiled = replace(compiled, notes=(*compiled.notes, inner))
        recipe = with_coefficients(recipe, learned[0].stage, tasks=own)
        locked, settings = replace(locked, recipe=recipe), ()
    again = command(
        settings,
        seed=seed,
        dtype=dtype,
        shard_size=None if parse_bytes(shard_size) == parse_bytes("5GB") else shard_size,
        device=None if (kind := _device(device).partition(":")[0]) == "cpu" else kind,
        lenient=lenient,
        allow_pickle=allow_pickle,
        copy_code=copy_code,
        license=licence,
    )

    def made(checkpoint: Checkpoint, by: Made, in_memory: bool = False) -> Plan:
        result = checkpoint if dtype is None else checkpoint.cast(dtype)
        extra = [SideOutput("merge_recipe.yml", text=recipe.text)]
        if by is compiled.made[-1]:
            extra.append(
                SideOutput(
                    LOCK, text=locked.written(__version__, learned[0].side if learned else {})
                )
            )
            extra += () if chosen is None else chosen.side
        extra += [side_output(*item) for m in learned for item in m.side.items()]
        notes: tuple[str, ...] = ()
        if card:
            text, notes = recipe_card(recipe, compiled.made, by, result, again, licence)
            extra.append(SideOutput(CARD, text=text))
        planned = plan(
            result,
            memory=memory,
            threads=threads,
            device=device,
            shard_size=shard_size,
            card=False,
            copy_code=copy_code,
            extra=extra,
            in_memory=in_memory,
        )
        return replace(planned, notes=(*notes, *planned.notes))

    adapter = None
    if compiled.base is None:
        main = made(compiled.checkpoint, compiled.made[-1], in_memory)
    else:
        from merge.extraction import output_of

        adapter = output_of(compiled.checkpoint, compiled.base, recipe.final.model, dtype)
        work = {"memory": memory, "threads": threads, "device": device}
        main = adapter.plan(**work, shard_size=shard_size)
    told = () if chosen is None else chosen.notes
    main = replace(main, notes=(*told, *compiled.notes, *main.notes))
    by_folder = {m.stage.model.save: m for m in compiled.made[:-1]}
    stages = tuple(
        (Path(folder), made(stage, by_folder[folder])) for folder, stage in compiled.saved
    )
    beside = () if chosen is None else chosen.beside
    if learned and out is not None:
        beside = (*beside, beside_of(out, "learn.safetensors"))
    if adapter is None:
        return Planned(main, stages, compiled, beside=beside)
    output = adapter

    def extract(progress: Callable[[int], None] | None) -> Plan:
        extracted = output.extracted(progress, **work).checkpoint
        return made(extracted, compiled.made[-1], in_memory)

    return Planned(main, stages, compiled, extract, beside)


def beside_of(out: str | Path, ending: str) -> Path:
    """A file beside an output, for what is found on the way to it."""
    place = Path(out)
    here = place if place.name else Path(os.path.abspath(place))
    return here.with_name(f"{here.name}.{ending}")


def apply_plan(
    planned: Planned,
    out: Path,
    *,
    replace: bool = False,
    fresh: bool = False,
    non_finite: Policy = "error",
    progress: Callable[[int], None] | None = None,
) -> Saved:
    """Compute a recipe into the folder ``out``, and the stages it keeps into theirs, first."""
    targets = [*planned.stages, (out, planned.plan)]
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
        check_unused(out, replace=replace)
    saved = []
    for folder, plan in targets:
        if plan is planned.plan and planned.extract is not None:
            plan = planned.extract(progress)
        saved.append(
            save_plan(
                plan,
                folder,
                replace=replace,
                fresh=fresh,
                non_finite=non_finite,
                progress=progress,
            )
        )
    for file in planned.beside:  # the output itself tells it now
        file.unlink(missing_ok=True)
    return saved[-1]


def save(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    shard_size: int | str = "5GB",
    card: bool = True,
    replace: bool = False,
    fresh: bool = False,
    copy_code: bool = False,
) -> Saved:
    """Plan ``checkpoint`` and compute it into the folder ``out``. card: with a README.md."""
    made = plan(
        checkpoint,
        memory=memory,
        threads=threads,
        device=device,
        shard_size=shard_size,
        card=card,
        copy_code=copy_code,
    )
    return save_plan(made, Path(out), replace=replace, fresh=fresh)


def push(
    checkpoint: Checkpoint,
    repo: str,
    *,
    branch: str = "main",
    create_pr: bool = False,
    private: bool | None = None,
    message: str | None = None,
    token: str | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    shard_size: int | str = "5GB",
    card: bool = True,
    fresh: bool = False,
    copy_code: bool = False,
) -> str:
    """Plan ``checkpoint`` and compute it into a repo on the Hub; the address of its page."""
    from merge.publishing import Target, open_target, push_plan

    target = open_target(Target(repo, branch, create_pr, private, message, token))
    made = plan(
        checkpoint,
        memory=memory,
        threads=threads,
        device=device,
        shard_size=shard_size,
        card=card,
        copy_code=copy_code,
        in_memory=True,
    )
    return push_plan(made, target, fresh=fresh).url


def save_plan(
    plan: Plan,
    out: Path,
    *,
    replace: bool = False,
    fresh: bool = False,
    non_finite: Policy = "error",
    progress: Callable[[int], None] | None = None,
) -> Saved:
    """Compute ``plan`` into the folder ``out``, which appears whole or not at all.

    An output of the very same plan that is complete and verified is left as it is.
    """
    from merge.verify import holds_plan
    from merge.write.folder import FolderSink, settle

    if not replace and not fresh and holds_plan(out, plan.hash):
        settle(out)
        return Saved(out, plan, None)
    from merge.engine.execute import execute

    with FolderSink(plan, out, replace=replace, fresh=fresh) as sink:
        report = execute(plan, sink, progress=progress, non_finite=non_finite)
        sink.publish()
    return Saved(out, plan, report)


def check_target(plan: Plan, out: Path) -> None:
    """Raise OutputRefused if ``out`` is, holds or lies in an input of ``plan``."""
    from merge.write.target import check_overlap

    check_overlap(out, plan.roots)


def state_dict(
    checkpoint: Checkpoint, *, threads: int | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Compute ``checkpoint`` into memory. Tied names share one tensor."""
    from merge.engine.execute import execute
    from merge.write.memory import MemorySink

    made = plan(checkpoint, threads=threads, device=device, card=False)
    sink = MemorySink(made)
    execute(made, sink)
    return {name: sink.tensors[checkpoint.tied.get(name, name)] for name in checkpoint.tensors}


def _device(wanted: str) -> str:
    """``cpu``, or a CUDA device that is there; ``auto`` takes a GPU when there is one."""
    if wanted == "cpu":
        return wanted
    if wanted != "auto" and wanted.partition(":")[0] != "cuda":
        raise PlanError("unknown device", found=wanted, expected="cpu, cuda, cuda:N or auto")
    import torch

    if torch.cuda.is_available():
        return "cuda" if wanted == "auto" else wanted
    if wanted == "auto":
        return "cpu"
    raise PlanError("there is no CUDA device here", found=wanted, do="use --device cpu or auto")
