"""Model soups: average the fine-tunes that make the average better (arXiv:2203.05482)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint, linear_combination
from merge.learning.score import Score, checked

__all__ = ["Soup", "Trial", "greedy_soup"]


@dataclass(frozen=True, slots=True)
class Trial:
    """The mean of the models ``members`` (by their place in the list) and its score."""

    members: tuple[int, ...]
    score: float
    taken: bool


@dataclass(frozen=True, slots=True)
class Soup:
    """The chosen average, and all that was tried: each model alone, then each addition."""

    checkpoint: Checkpoint
    members: tuple[int, ...]
    score: float
    trials: tuple[Trial, ...]


def greedy_soup(
    models: Sequence[Checkpoint],
    score: Score,
    *,
    progress: Callable[[Trial], None] | None = None,
) -> Soup:
    """The greedy soup of Wortsman et al. 2022: never worse than the best single model.

    The models are sorted by their own score; starting from the best, each is added to the mean if
    the mean then scores at least as high. ``score`` is called 2 n - 1 times; higher is better.
    progress: called with each trial.
    """
    if not models:
        raise PlanError("a soup of no models", expected="at least one")
    trials: list[Trial] = []

    def tried(members: tuple[int, ...], best: float | None) -> Trial:
        mean = linear_combination([(1.0 / len(members), models[i]) for i in members])
        found = checked(score(mean), mean.label)
        trial = Trial(members, found, best is None or found >= best)
        trials.append(trial)
        if progress is not None:
            progress(trial)
        return trial

    alone = [tried((i,), None).score for i in range(len(models))]
    order = sorted(range(len(models)), key=lambda i: -alone[i])
    members: tuple[int, ...] = (order[0],)
    best = alone[order[0]]
    for i in order[1:]:
        trial = tried((*members, i), best)
        if trial.taken:
            members, best = trial.members, trial.score
    chosen = linear_combination([(1.0 / len(members), models[i]) for i in members])
    return Soup(chosen, members, best, tuple(trials))
