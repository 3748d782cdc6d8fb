"""Searches for the values of a few numbers: grid, golden section, optuna's, and CMA-ES."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from merge.errors import RecipeError
from merge.learning.ranges import Range

__all__ = ["METHODS", "Trial", "Values", "search", "strategy_of", "tries"]

Values = tuple[float, ...]
Strategy = Generator[Values, float, None]
"""Yields values to be scored, and is sent their score."""

METHODS = ("grid", "golden", "optuna", "cmaes", "random")
Method = Literal["grid", "golden", "optuna", "cmaes", "random"]

_MOST = 10_000  # points of a grid
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Trial:
    """Values that were scored; higher is better. number counts from 0, generation by populations.

    known: the score was there already, from an interrupted search. of: how many there will be at
    most.
    """

    number: int
    values: Values
    score: float
    best: bool
    generation: int = 0
    known: bool = False
    of: int = 0


def search(
    strategy: Strategy,
    score: Callable[[Values], float],
    *,
    start: Values | None = None,
    known: Mapping[Values, float] | None = None,
    population: int = 0,
    total: int = 0,
    passed: Callable[[Values], None] | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """All trials in their order. ``start`` is tried first, so that the best is never worse.

    known: scores of an earlier run; the same search finds the same values again and takes these.
    The same values are scored once. passed: called for values whose score is known.
    """
    found: list[Trial] = []
    seen: dict[Values, float] = {}
    earlier = known or {}
    best = -math.inf

    def tried(values: Values, number: int) -> float:
        nonlocal best
        if values in seen:
            return seen[values]
        if values in earlier and passed is not None:
            passed(values)
        number_found = earlier[values] if values in earlier else score(values)
        seen[values] = number_found
        better = number_found > best or not found
        best = max(best, number_found)
        generation = number // population if population else 0
        trial = Trial(
            len(found), values, number_found, better, generation, values in earlier, total
        )
        found.append(trial)
        if progress is not None:
            progress(trial)
        return number_found

    if start is not None:
        tried(start, 0)
    try:
        values = next(strategy)
        for number in itertools.count():
            values = strategy.send(tried(values, number))
    except StopIteration:
        pass
    return found


def tries(method: str, ranges: Sequence[Range], trials: int | None) -> int:
    """How many values a search tries at most; RecipeError for a grid of too many.

    By default all of a grid (11 where there are no steps), 12 of a golden section, else 50, and
    100 with ``cmaes``.
    """
    if method != "grid":
        return trials or {"golden": 12, "cmaes": 100}.get(method, 50)
    points = math.prod(map(len, _axes(ranges, trials)))
    if points > (trials or _MOST):
        raise RecipeError(
            "a grid has more points than are to be tried",
            found=points,
            expected=f"{trials or _MOST} at most",
            do="take fewer values, or another method, such as optuna",
        )
    return points


def strategy_of(
    method: str,
    ranges: Sequence[Range],
    *,
    trials: int | None = None,
    seed: int = 0,
    population: int | None = None,
    sigma: float = 1 / 6,
    start: Values | None = None,
) -> Strategy:
    """The strategy of that name over ``ranges``; RecipeError for what it cannot search.

    trials: as for `tries`. sigma: of the first population of ``cmaes``, as a share of each range.
    """
    count = tries(method, ranges, trials)
    if method == "grid":
        return _grid(_axes(ranges, trials))
    if method == "golden":
        return _golden(ranges, count)
    if method == "cmaes" and len(ranges) < 2:
        raise RecipeError(
            "cmaes searches two numbers or more",
            found=f"{len(ranges)}",
            do="use golden or grid for one",
        )
    if method == "cmaes":
        return _evolved(ranges, count, seed, population, sigma, start)
    if method not in METHODS:
        raise RecipeError("unknown search", found=method, expected=", ".join(METHODS))
    return _sampled(method, ranges, count, seed, start)


def _axes(ranges: Sequence[Range], trials: int | None) -> list[tuple[float, ...]]:
    return [r.grid(trials if trials and len(ranges) == 1 else 11) for r in ranges]


def _grid(axes: Sequence[tuple[float, ...]]) -> Strategy:
    for values in itertools.product(*axes):  # noqa: UP028  (a product cannot be sent to)
        yield values


def _golden(ranges: Sequence[Range], trials: int) -> Strategy:
    """Sections of a stretch, on the side of the better of two points inside it (Kiefer 1953)."""
    if len(ranges) != 1:
        raise RecipeError(
            "a golden section searches one number",
            found=len(ranges),
            do="use optuna, cmaes or grid for several",
        )
    only = ranges[0]
    low, high = 0.0, 1.0
    a, b = high - _GOLDEN, low + _GOLDEN
    at_a = yield (only.at(a),)
    at_b = yield (only.at(b),)
    for _ in range(trials - 2):
        if high - low < 1e-3:
            return
        if at_a >= at_b:
            high, b, at_b = b, a, at_a
            a = high - _GOLDEN * (high - low)
            at_a = yield (only.at(a),)
        else:
            low, a, at_a = a, b, at_b
            b = low + _GOLDEN * (high - low)
            at_b = yield (only.at(b),)


def _sampled(
    method: str, ranges: Sequence[Range], trials: int, seed: int, start: Values | None
) -> Strategy:
    """optuna's samplers, each number as its place in its range, from 0 to 1."""
    optuna: Any = _extra("optuna", method)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = [f"x{i}" for i in range(len(ranges))]
    spaces = {n: optuna.distributions.FloatDistribution(0.0, 1.0) for n in names}
    tree = method == "optuna"
    sampler = optuna.samplers.TPESampler if tree else optuna.samplers.RandomSampler
    study = optuna.create_study(direction="maximize", sampler=sampler(seed=seed))
    if start is not None and tree:
        pairs = zip(names, ranges, start, strict=True)
        study.enqueue_trial({n: r.place(v) for n, r, v in pairs})
    for _ in range(trials):
        trial = study.ask(spaces)
        found = yield tuple(r.at(trial.params[n]) for n, r in zip(names, ranges, strict=True))
        study.tell(trial, found)


def _evolved(
    ranges: Sequence[Range],
    trials: int,
    seed: int,
    population: int | None,
    sigma: float,
    start: Values | None,
) -> Strategy:
    """CMA-ES (Hansen, arXiv:1604.00772) in the cube of places, from the start or the middle."""
    cmaes: Any = _extra("cmaes", "cmaes")
    import numpy as np

    centre = [0.5] * len(ranges)
    if start is not None:
        centre = [r.place(v) for r, v in zip(ranges, start, strict=True)]
    own = cmaes.CMA(
        np.array(centre),
        sigma,
        bounds=np.array([[0.0, 1.0]] * len(ranges)),
        seed=seed,
        population_size=population,
    )
    tried: list[tuple[Any, float]] = []
    for _ in range(trials):
        place = own.ask()
        found = yield tuple(r.at(float(p)) for r, p in zip(ranges, place, strict=True))
        tried.append((place, -found))
        if len(tried) == own.population_size:
            own.tell(tried)
            tried = []


def _extra(package: str, method: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise RecipeError(
            f"the search {method!r} is done by {package}, which is not installed",
            do="pip install 'hf-merge[search]', or use grid or golden",
        ) from None
