"""``tune:`` in recipes that are planned and applied: told, or searched and written beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from merge.applying import beside_of
from merge.candidates import Candidates, Opener, unsaid
from merge.errors import RecipeError
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.learning.search import Trial, tries
from merge.plan.model import SideOutput
from merge.recipe.computed import Steps
from merge.recipe.read import Recipe, parse_recipe
from merge.recipe.tune_words import TuneEntry
from merge.run import PlanOptions
from merge.searches import method_of, tune_recipe
from merge.tuning.knobs import settings_of

__all__ = ["SIDE", "Chosen", "choose"]

SIDE = "tune.json"
"""What was tried, in the output."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A recipe with its values chosen, or as it can be planned before they are.

    notes: what was found, or what is to be done. side: further files of the output. beside: files
    that hold what was found so far.
    """

    recipe: Recipe
    notes: tuple[str, ...]
    side: tuple[SideOutput, ...] = ()
    beside: tuple[Path, ...] = ()


def choose(
    recipe: Recipe,
    opener: Callable[[Reference], Checkpoint],
    steps: Steps | None,
    seed: int | None,
    options: PlanOptions,
    out: str | Path | None,
    fresh: bool,
    watch: Callable[[Trial], None] | None,
) -> Chosen:
    """What ``tune:`` makes of a recipe. Without ``steps`` nothing is computed.

    out: the output, beside which the study is kept; an output of before tells what it tried.
    """
    for stage in recipe.stages:
        if stage.model.tune is not None and stage is not recipe.final:
            raise stage.document.error(
                "only the result of a recipe is tuned",
                ("tune",),
                key="tune",
                do=f"write it in the last document, with keys such as {stage.name}:parameters.t",
            )
    final = recipe.final
    entry = final.model.tune
    assert entry is not None
    if steps is None:
        return _planned(recipe, entry, opener, seed)
    place = None if out is None else Path(out)
    study = None if place is None else beside_of(place, "tune.jsonl")
    found = tune_recipe(
        recipe,
        entry,
        opener,
        seed=seed,
        steps=steps,
        study=study,
        finished=None if place is None else place / SIDE,
        fresh=fresh,
        progress=watch,
        options=options,
    )
    line = final.document.where(("tune",))["line"]
    again = parse_recipe(found.recipe, final.document.name, lenient=final.lenient)
    side = SideOutput(SIDE, text=json.dumps(found.to_json(), indent=1) + "\n")
    beside = () if study is None else (study,)
    return Chosen(again, (f"line {line}: tuned: {found.told()}",), (side,), beside)


def _planned(
    recipe: Recipe, entry: TuneEntry, opener: Callable[[Reference], Checkpoint], seed: int | None
) -> Chosen:
    """The recipe as it can be planned before it is tuned, and a note of what will be."""
    own = Candidates(recipe, entry, Opener(opener), seed, None, PlanOptions())
    places = own.places()
    ranges = [knob.range for place in places for knob in place.knobs]
    method = entry.method or method_of(ranges)
    where = recipe.final.document.where(("tune",))
    by = entry.score or ", ".join(e.path for e in (entry.data or {}).values())
    if not by:
        raise unsaid(entry, where)
    try:
        count = tries(method, ranges, entry.trials)
    except RecipeError as error:
        raise error.at(**where) from None
    spans = "; ".join(
        f"{p.called} from {p.range}" + (f" ({len(p.knobs)} numbers)" if len(p.knobs) > 1 else "")
        for p in places
    )
    note = (
        f"line {where['line']}: tuned by {method} on {by} when the recipe is applied, at most"
        f" {count} trials: {spans}"
    )
    absent = [p for p in places if p.start is None]
    middle = [p.range.at(0.5) for p in absent for _ in p.knobs]
    if absent:
        note += "; here with values of the middle"
    return Chosen(own.read(settings_of(absent, tuple(middle))), (note,))
