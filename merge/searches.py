"""Values of a recipe chosen by a score: ``tune:`` in recipes, `merge.tune`, ``merge search``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from merge.candidates import Candidates, Opener, score_of
from merge.checkpoint import open_checkpoint
from merge.errors import MergeError, RecipeError, SinkError
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.learning.score import Score, checked
from merge.learning.search import Trial, Values, search, strategy_of, tries
from merge.recipe.computed import Steps
from merge.recipe.document import read_documents
from merge.recipe.read import Recipe, parse_recipe, read_recipe
from merge.recipe.resolved import resolved
from merge.recipe.tune_words import TuneEntry
from merge.run import PlanOptions
from merge.tuning.knobs import settings_of, start_of
from merge.tuning.result import Tuned
from merge.tuning.study import Study, fingerprint

__all__ = ["Tuned", "method_of", "tune", "tune_recipe"]


def tune(
    recipe: str | Path,
    *,
    score: Score | str | None = None,
    study: str | Path | None = None,
    fresh: bool = False,
    better: str | Path | None = None,
    settings: Sequence[str] = (),
    allow_pickle: bool = False,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    scratch: Path | None = None,
    progress: Callable[[Trial], None] | None = None,
    **words: Any,
) -> Tuned:
    """The values of a recipe's parameters that score best; the recipe's own are tried, too.

    words: those of ``tune:`` in a recipe, which go before the recipe's: over (keys such as
    ``lambda`` to ranges such as "0:2:0.1"), data, metric, method, trials, population, sigma, seed,
    minimize. score: a function from a checkpoint to a number, higher is better, or a command, in
    the place of data. study: a file that keeps what was tried; the same call takes it up again,
    unless ``fresh``. better: a file that is given the recipe with the best values so far after each
    better trial. scratch: where candidates for a command are written. progress: called with
    each trial.

    While a number scales what the merge adds, as a scale or a weight does, one merge is computed
    for each number, and every further candidate is a sum of those in memory.

    Example::

        found = merge.tune("tsv.yml", over={"lambda": "0.5:3:0.25"}, data="valid.csv?label=label")
        Path("tuned.yml").write_text(found.recipe)
    """
    read = read_recipe(recipe, settings=settings)
    given = {k: v for k, v in words.items() if v is not None}
    if isinstance(score, str):
        given["score"], score = score, None
    known = read.final.model.tune
    said = {} if known is None else read.final.document.data.get("tune") or {}
    if score is not None or "score" in given or "data" in given:
        said = {k: v for k, v in said.items() if k not in ("score", "data")}
    merged = {**said, **given}
    if "over" not in merged:
        raise RecipeError(
            "nothing is said to be tuned",
            recipe=recipe,
            key="over",
            expected="such as over={'lambda': '0:2:0.1'}, or tune: in the recipe",
        )
    over = {k: _mapping(v) for k, v in merged["over"].items()}
    stub = {"merge_method": "linear", "models": [{"model": "x"}], "tune": {**merged, "over": over}}
    text = json.dumps(stub)
    entry = parse_recipe(text, "the options of the search").final.model.tune
    assert entry is not None
    opener = Opener(partial(open_checkpoint, allow_pickle=allow_pickle))
    return tune_recipe(
        read,
        entry,
        opener,
        score=score,
        study=None if study is None else Path(study),
        fresh=fresh,
        better=None if better is None else Path(better),
        scratch=scratch,
        progress=progress,
        options=PlanOptions(memory, threads, device),
    )


def _mapping(given: object) -> object:
    """A range as it is given; ``{low: 0, high: 1, each: model}`` as text is that mapping."""
    if isinstance(given, str) and given.strip().startswith("{"):
        return read_documents(given, "a range")[0].data
    return given


def tune_recipe(
    recipe: Recipe,
    entry: TuneEntry,
    opener: Callable[[Reference], Checkpoint],
    *,
    score: Score | None = None,
    seed: int | None = None,
    steps: Steps | None = None,
    study: Path | None = None,
    finished: Path | None = None,
    fresh: bool = False,
    better: Path | None = None,
    scratch: Path | None = None,
    progress: Callable[[Trial], None] | None = None,
    options: PlanOptions,
) -> Tuned:
    """The search that ``entry`` describes, over a recipe that was read.

    finished: a tune.json of before, whose trials are taken where it is of the same search.
    """
    if steps is None:
        from merge.steps import RecipeSteps

        steps = RecipeSteps()
    own = Candidates(recipe, entry, Opener(opener), seed, steps, options)
    places = own.places()
    knobs = [knob for place in places for knob in place.knobs]
    names = [knob.name for knob in knobs]
    start = start_of(places)
    ranges = [knob.range for knob in knobs]
    middle = tuple(r.at(0.5) for r in ranges)
    try:
        first = own.compiled(settings_of(places, start or middle))
    except MergeError as error:
        raise error.at(**recipe.final.document.where(("tune",))) from None
    judge, judged = score_of(own, first, score, scratch)
    method = entry.method or method_of(ranges)
    number = next(n for n in (entry.seed, seed, recipe.final.model.seed) if n is not None)
    stamp = fingerprint(resolved(recipe, (), without=("tune",)), names, judged, first)
    kept = Study(study, stamp, names, fresh=fresh)
    if finished is not None and not fresh:
        _take(kept, finished, stamp)

    def scored(values: Values) -> float:
        checkpoint = own.compiled(settings_of(places, values))
        found = checked(judge(checkpoint), checkpoint.label) + 0.0  # no negative zero
        kept.add(values, found)
        return found

    def told_of(values: Values) -> str:
        return ", ".join(f"{n} = {v:g}" for n, v in zip(names, values, strict=True))

    def written(values: Values, reached: float) -> str:
        """The recipe with some values."""
        head = f"# tuned by {method}: {told_of(values)}; {judged}: {reached:.6g}\n"
        chosen = settings_of(places, values)
        return resolved(recipe, chosen, without=("tune",), head=head)

    def watched(trial: Trial) -> None:
        if trial.best and better is not None:
            _write(better, written(trial.values, trial.score))
        if progress is not None:
            progress(trial)

    try:
        strategy = strategy_of(
            method,
            ranges,
            trials=entry.trials,
            seed=number,
            population=entry.population,
            sigma=entry.sigma,
            start=start,
        )
        trials = search(
            strategy,
            scored,
            start=start,
            known=dict(kept.known),
            population=_population(method, entry, len(knobs)),
            total=tries(method, ranges, entry.trials) + (start is not None),
            passed=lambda values: judge.passed(own.compiled(settings_of(places, values))),
            progress=watched,
        )
    except RecipeError as error:
        raise error.at(**recipe.final.document.where(("tune",))) from None
    best = max(trials, key=lambda t: (t.score, -t.number))
    return Tuned(
        tuple(names),
        best.values,
        best.score,
        tuple(trials),
        settings_of(places, best.values),
        written(best.values, best.score),
        method,
        judged,
        number,
        stamp,
        None if start is None else 0,
        judge.merges(),
    )


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f".{file.name}.partial")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        said = f"the recipe cannot be written: {error.strerror}"
        raise SinkError(said, file=file) from None


def method_of(ranges: Sequence[Any]) -> str:
    """What suits the ranges: all of few values, sections of one stretch, else optuna."""
    counts = [r.count for r in ranges]
    points = 1
    for count in counts:
        points *= count or 10**6
    if points <= 200:
        return "grid"
    return "golden" if len(ranges) == 1 else "optuna"


def _population(method: str, entry: TuneEntry, count: int) -> int:
    """Trials in a generation; 0 where there are none."""
    if method != "cmaes":
        return 0
    return entry.population or 4 + math.floor(3 * math.log(count))


def _take(kept: Study, finished: Path, stamp: str) -> None:
    try:
        found = json.loads(finished.read_text())
        if found["stamp"] == stamp:
            kept.take(found["trials"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # an output of before is a help, and no input
