"""Lines of the table, and the ways of making them: as it is, tuned, by several seeds."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import merge
from benchmarks.quality.fixture import Fixture
from benchmarks.quality.measure import Judge, Right, mean_accuracy

RANDOM_SEEDS = (0, 1, 2)
"""Seeds of methods that draw at random."""


@dataclass(frozen=True, slots=True)
class Made:
    """What came of a line: for each run the test texts that are right, what was chosen, seconds."""

    runs: tuple[Right, ...]
    settings: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0

    def summary(self) -> str:
        """The mean accuracy, what was chosen, and the time, in a line."""
        mean = 100 * sum(mean_accuracy(r) for r in self.runs) / len(self.runs)
        chosen = self.settings.get("scale", self.settings.get("chosen"))
        at = "" if chosen is None else f", {chosen}"
        return f"{mean:.1f}{at}, {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class Bench:
    """What a line is made with."""

    made: Fixture
    judge: Judge
    scratch: Path

    @property
    def base(self) -> Path:
        """The base's folder."""
        return self.made.base

    @property
    def experts(self) -> list[Path]:
        """The experts' folders, in the order of the tasks."""
        return list(self.made.experts.values())


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: its key, what stands in it, what it needs, how it is made."""

    key: str
    title: str
    data: str
    make: Callable[[Bench], Made]


def single(
    checkpoint: Callable[[Bench], merge.Checkpoint], **settings: object
) -> Callable[[Bench], Made]:
    """A merge without choices."""

    def make(bench: Bench) -> Made:
        return Made((bench.judge.examined(checkpoint(bench).state_dict()),), settings)

    return make


def tuned(
    checkpoint: Callable[[Bench], merge.Checkpoint],
    scales: Sequence[float],
    origin: Callable[[Bench], merge.Checkpoint] = lambda bench: merge.open(bench.base),
) -> Callable[[Bench], Made]:
    """A merge whose distance from an origin is the scale that does best on validation texts.

    The merge is computed once; each scale is then one sum of two checkpoints.
    """

    def make(bench: Bench) -> Made:
        base = origin(bench)
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            whole = merge.open(checkpoint(bench).save(Path(folder) / "merged"))
            found = merge.sweep(
                lambda scale: base + scale * (whole - base),
                scales,
                lambda c: bench.judge.score(c.state_dict()),
            )
            right = bench.judge.examined(found.checkpoint.state_dict())
        return Made((right,), {"scale": found.value, "curve": [list(p) for p in found.curve]})

    return make


def random(checkpoint: Callable[[Bench, int], merge.Checkpoint]) -> Callable[[Bench], Made]:
    """A merge that draws at random, by several seeds."""

    def make(bench: Bench) -> Made:
        runs = [bench.judge.examined(checkpoint(bench, s).state_dict()) for s in RANDOM_SEEDS]
        return Made(tuple(runs), {"seeds": list(RANDOM_SEEDS)})

    return make


def timed(row: Row, bench: Bench) -> Made:
    """A line with the seconds that it took, evaluation and choices included."""
    start = time.perf_counter()
    made = row.make(bench)
    return Made(made.runs, made.settings, time.perf_counter() - start)
