"""The eight tasks as the library takes them: `merge.Task`s on a fixture's texts."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

import merge
from benchmarks.quality.encoder import Inputs, classifier, encode, stream
from benchmarks.quality.fixture import Fixture
from benchmarks.quality.sources import Text
from benchmarks.quality.tasks import TextTask

ROWS = 8
"""Texts of a batch."""


def task_of(
    made: Fixture, name: str, labelled: int = 0, more: bool = False, seed: int = 0
) -> merge.Task:
    """A task: unlabelled texts to adapt on, validation texts to choose by.

    labelled: learn on the labels of this many training texts instead. more: the texts that the
    expert was trained on are given too, without their labels. seed: of the texts' order.
    """
    task = next(t for t in made.tasks if t.name == name)
    chosen = task.train[:labelled] if labelled else task.adapt + (task.train if more else ())
    batches = shuffled(made, task, chosen, seed)
    return merge.Task(
        classifier(made.base, made.heads[name]),
        functional.cross_entropy,
        batches if labelled else [(inputs, None) for inputs, _ in batches],
        right=lambda out, target: float((out.argmax(1) == target).float().mean()),
        name=name,
        validate=tuple(stream(made.base, task, task.valid)),
    )


def tasks_of(
    made: Fixture, labelled: int = 0, more: bool = False, seed: int = 0
) -> dict[str, merge.Task]:
    """All tasks of a fixture."""
    return {name: task_of(made, name, labelled, more, seed) for name in made.experts}


def shuffled(
    made: Fixture, task: TextTask, texts: Sequence[Text], seed: int
) -> list[tuple[Inputs, Tensor]]:
    """Small batches of texts in an order drawn by the fixture's seed and the merge's."""
    order = random.Random(f"{task.name} {made.seed} {seed}").sample(texts, len(texts))
    parts = [order[i : i + ROWS] for i in range(0, len(order), ROWS)]
    return [(encode(made.base, p), torch.tensor(task.targets(p))) for p in parts]
