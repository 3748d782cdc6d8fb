"""The loss between two networks, as they are and aligned: ``merge barrier``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.aligning import check_method, symmetry_of
from merge.alignment.report import Report
from merge.analysis.barrier import (
    POINTS,
    Curve,
    Estimate,
    LayerBarrier,
    curve,
    estimate,
    layer_barriers,
)
from merge.analysis.task import Task
from merge.checkpoint import open_checkpoint
from merge.checkpoint.memory import open_state_dict
from merge.errors import RecipeError
from merge.families.layers import place_of
from merge.symmetry.action import apply
from merge.tasks import match_states, open_data, state_of, traced_symmetry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Barriers", "Lines", "barrier"]


@dataclass(frozen=True, slots=True)
class Lines:
    """The way from the first network to one form of the second: ``called`` naive, or aligned.

    train, test: losses along it. layers: each layer's share. estimate: what the ends foretell.
    """

    called: str
    train: Curve
    test: Curve
    layers: tuple[LayerBarrier, ...] = ()
    estimate: Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "called": self.called,
            "train": self.train.to_json(),
            "test": self.test.to_json(),
            "layers": [x.to_json() for x in self.layers],
            "estimate": None if self.estimate is None else self.estimate.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Barriers:
    """All that was measured between two networks; ``str`` makes a table of it."""

    first: str
    second: str
    lines: tuple[Lines, ...]
    report: Report | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "first": self.first,
            "second": self.second,
            "lines": [x.to_json() for x in self.lines],
            "alignment": None if self.report is None else self.report.to_json(),
        }

    def picture(self, path: str | Path) -> Path:
        """Draw it into a file, whose ending says what kind: .png, .svg or .pdf."""
        from merge.analysis.picture import draw

        return draw(self, Path(path))

    def __str__(self) -> str:
        head = ["", "barrier on test", "on train", "by the ends", "by the middle", "loss half way"]
        rows = [[*head, "right half way"]]
        for line in self.lines:
            middle = line.test.middle
            numbers = [line.test.barrier, line.train.barrier]
            foretold = line.estimate
            numbers += [math.nan] * 2 if foretold is None else [foretold.rise, foretold.from_middle]
            cells = [f"{x:.4f}".replace("nan", "") for x in (*numbers, middle.loss)]
            right = "" if middle.right is None else f"{middle.right:.1%}"
            rows.append([line.called, *cells, right])
        ends = [p.loss for p in self.lines[0].test.points]
        parts = [f"loss of the ends: {ends[0]:.4f}, {ends[-1]:.4f}", _table(rows)]
        layers = [line.layers for line in self.lines]
        if all(layers):
            rows = [["one layer alone", *(line.called for line in self.lines)]]
            for each in zip(*layers, strict=True):
                rows.append([each[0].layer, *(f"{x.alone:.4f}" for x in each)])
            parts.append(_table(rows))
        return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{c:>{w}}" for c, w in zip(row, widths, strict=True)]
        lines.append("  ".join([f"{row[0]:{widths[0]}}", *cells[1:]]).rstrip())
    return "\n".join(lines)


def barrier(
    first: object,
    second: object,
    data: str | Task,
    *,
    aligned: str | None = "weight",
    symmetry: object = None,
    keep: Collection[str] = (),
    points: int = POINTS,
    layers: bool = True,
    curvature: bool = True,
    batch: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Barriers:
    """The loss along the line from one network to another, naive and with the second aligned.

    first, second: anything `merge.open` takes. data: a `merge.Task`, or text: ``module:function``,
    or files for a model of transformers (docs/data.md). aligned: how, or None. symmetry: a spec,
    as for `merge.align`; by default it is traced from the code that runs the networks. keep: as
    for `merge.align`. points: of the line, an odd number, so that the middle is among them. layers:
    also each layer's share. curvature: also what slope and curvature foretell, at the ends and
    half way. batch: samples that are run at a time. limit: samples of the training part and of the
    test part, at most. progress: called with batches judged since the last call, and all of them.

    Both networks are held in memory and run in float32.
    """
    if points < 3 or points % 2 == 0:
        raise RecipeError(
            "a line needs an odd number of points, with both ends and the middle",
            key="points",
            found=points,
            expected="3, 5, 7, ...",
        )
    one, two = (open_checkpoint(x) for x in (first, second))
    if aligned is not None:
        check_method(aligned)
        if aligned == "transport":
            raise RecipeError(
                "a barrier is measured between networks aligned by permutations",
                key="aligned",
                found=aligned,
                do="give what merge.align(..., method='transport') makes, and aligned=None",
            )
    task = judge = open_data(data, one, two, batch=batch, limit=limit)
    a, b = (state_of(task, c) for c in (one, two))
    if progress is not None:
        total = _batches(task, points, len(_layers_of(a)) if layers else 0, curvature)
        judge = _watched(task, total * (1 if aligned is None else 2), progress)
    lines = [_lines(judge, "naive", a, b, points, layers, curvature)]
    report = None
    if aligned is not None:
        if symmetry is None:
            found = traced_symmetry(task)
        else:
            known = replace(open_state_dict(b), side=two.side, label=two.label)
            found = symmetry_of(known, symmetry)
        match = match_states(task, found, a, b, aligned, keep=keep)
        moved = apply(found, b, match.element)
        lines.append(_lines(judge, f"aligned by {aligned}", a, moved, points, layers, curvature))
        report = match.report
    return Barriers(one.label, two.label, tuple(lines), report)


def _lines(
    task: Task,
    called: str,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    points: int,
    layers: bool,
    curvature: bool,
) -> Lines:
    test = task.test or task.train
    train = curve(task, a, b, task.train, points=points)
    made = Lines(called, train, curve(task, a, b, test, points=points) if task.test else train)
    if layers:
        made = replace(made, layers=tuple(layer_barriers(task, a, b, test, _layers_of(a))))
    if curvature:
        made = replace(made, estimate=estimate(task, a, b, task.train))
    return made


def _batches(task: Task, points: int, layers: int, curvature: bool) -> int:
    """Batches that are judged for one line."""
    train, test = len(task.train), len(task.test)
    shares = 2 * (layers + 1) if layers else 0  # of each layer two, and both ends
    return points * (train + test) + shares * (test or train) + 3 * train * curvature


def _watched(task: Task, total: int, progress: Callable[[int, int], None]) -> Task:
    """A task that tells of each batch that is judged."""

    def criterion(out: Any, target: Any) -> Tensor:
        found = task.criterion(out, target)
        progress(1, total)
        return found

    return replace(task, criterion=criterion)


def _layers_of(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The tensors of each layer; what is in none goes by the module that it is in."""
    found: dict[str, list[str]] = {}
    for name in state:
        place = place_of(name)
        layer = name.rpartition(".")[0] if place is None else f"{place[0]}.{place[1]}".lstrip(".")
        found.setdefault(layer or name, []).append(name)
    return found
