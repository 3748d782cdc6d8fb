"""How good a checkpoint is on the eight tasks; bootstrap intervals over test texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.encoder import Classifier, Stream, classifier, outputs, stream
from benchmarks.quality.fixture import Fixture

DRAWS = 2000
"""Resamples of the test texts behind an interval."""

Right = dict[str, list[bool]]
"""For each task, which test texts were right."""


class Judge:
    """Runs checkpoints on the texts of a fixture."""

    def __init__(self, made: Fixture) -> None:
        self.fixture = made
        self.module: Classifier = classifier(made.base)
        self.valid = {t.name: stream(made.base, t, t.valid) for t in made.tasks}
        self.test = {t.name: stream(made.base, t, t.test) for t in made.tasks}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's tensors; what it lacks is an error."""
        self.module.load_state_dict(dict(state))

    def right(self, parts: Mapping[str, Stream]) -> Right:
        """Which texts the loaded tensors get right, for each task among ``parts``."""
        found: Right = {}
        for name, texts in parts.items():
            self.module.head = self.fixture.heads[name]
            found[name] = (outputs(self.module, texts).argmax(1) == texts.targets).tolist()
        return found

    def score(self, state: Mapping[str, Tensor]) -> float:
        """Mean accuracy on the validation texts: what settings are chosen by."""
        self.load(state)
        return mean_accuracy(self.right(self.valid))

    def examined(self, state: Mapping[str, Tensor]) -> Right:
        """Which test texts are right."""
        self.load(state)
        return self.right(self.test)


def mean_accuracy(right: Right) -> float:
    """The mean over tasks of the share that is right."""
    return float(np.mean([np.mean(r) for r in right.values()]))


@dataclass(frozen=True, slots=True)
class Figures:
    """Per cent: accuracy, in parts of the experts' (mean and worst task), 95 % intervals."""

    mean: float
    low: float
    high: float
    normalised: float
    normalised_low: float
    normalised_high: float
    worst: float
    worst_task: str


def figures(runs: Sequence[Right], experts: Right, seed: int = 0) -> Figures:
    """Figures of a method from its runs, paired with the experts on the same test texts.

    The test texts of each task are drawn anew with replacement, the same for runs and experts.
    """
    names = list(experts)
    ours = {n: np.mean([np.asarray(r[n], float) for r in runs], axis=0) for n in names}
    theirs = {n: np.asarray(experts[n], float) for n in names}
    draw = np.random.default_rng(seed)
    means, parts = np.zeros((2, DRAWS))
    for n in names:
        size = len(theirs[n])
        counts = draw.multinomial(size, np.full(size, 1 / size), DRAWS) / size
        a, b = counts @ ours[n], counts @ theirs[n]
        means += a / len(names)
        parts += a / np.maximum(b, 1e-9) / len(names)
    ratio = {n: float(ours[n].mean() / theirs[n].mean()) for n in names}
    worst = min(ratio, key=lambda n: ratio[n])
    low, high = np.quantile(means, (0.025, 0.975))
    low_part, high_part = np.quantile(parts, (0.025, 0.975))
    per_cent = (
        np.mean([o.mean() for o in ours.values()]), low, high,
        np.mean(list(ratio.values())), low_part, high_part, ratio[worst],
    )  # fmt: skip
    return Figures(*(100 * float(x) for x in per_cent), worst)


def difference(runs: Sequence[Right], others: Sequence[Right], seed: int = 0) -> tuple[float, ...]:
    """Points of mean accuracy between two methods, and the paired 95 % interval."""
    draw = np.random.default_rng(seed)
    total, points = np.zeros(DRAWS), 0.0
    names = list(runs[0])
    for n in names:
        apart = np.mean([np.asarray(r[n], float) for r in runs], axis=0)
        apart = apart - np.mean([np.asarray(r[n], float) for r in others], axis=0)
        size = len(apart)
        total += draw.multinomial(size, np.full(size, 1 / size), DRAWS) / size @ apart / len(names)
        points += float(apart.mean()) / len(names)
    low, high = np.quantile(total, (0.025, 0.975))
    return 100 * points, 100 * float(low), 100 * float(high)


def one_thread() -> None:
    """The same figures on every machine with as many instructions: sums are taken by one thread."""
    torch.set_num_threads(1)
