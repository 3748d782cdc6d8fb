"""A picture of a search: the score over one number, or trial by trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge.analysis.figure import COLOURS, GREY, figure

__all__ = ["draw_trials"]

_MOST = 12  # numbers that get a picture of their own


def draw_trials(
    path: Path,
    names: Sequence[str],
    rows: Sequence[Sequence[float]],
    scores: Sequence[float],
    start: int | None,
    label: str,
) -> Path:
    """Draw scores into a file: over the number where there is one, else trial by trial and each.

    rows: values by trial. start: the trial of the recipe's own values. label: what the score is.
    """
    best = max(range(len(scores)), key=lambda i: scores[i])
    if len(names) == 1:
        with figure(path, 6.0, 4.2) as drawn:
            axes = drawn.subplots()
            _over(axes, [r[0] for r in rows], scores, start, best, joined=True)
            axes.set_xlabel(names[0])
            axes.set_ylabel(label)
            _legend(axes)
        return path
    shown = list(range(min(len(names), _MOST)))
    columns = 1 + -(-len(shown) // 3) if len(shown) > 3 else 2
    count = -(-len(shown) // (columns - 1)) if columns > 1 else 1
    with figure(path, 4.6 + 3.0 * (columns - 1), max(3.4, 2.3 * count)) as drawn:
        grid = drawn.add_gridspec(count, columns, width_ratios=[1.5] + [1] * (columns - 1))
        axes = drawn.add_subplot(grid[:, 0])
        _history(axes, scores, label)
        for k in shown:
            inner = drawn.add_subplot(grid[k % count, 1 + k // count])
            _over(inner, [r[k] for r in rows], scores, start, best, joined=False)
            inner.set_xlabel(names[k], fontsize=8)
            inner.tick_params(labelsize=7)
    return path


def _over(
    axes: Any,
    values: Sequence[float],
    scores: Sequence[float],
    start: int | None,
    best: int,
    *,
    joined: bool,
) -> None:
    order = sorted(range(len(values)), key=lambda i: values[i])
    xs, ys = [values[i] for i in order], [scores[i] for i in order]
    axes.plot(xs, ys, ".-" if joined else ".", color=COLOURS[1], linewidth=1.2, markersize=6)
    if start is not None:
        text = f"as written: {scores[start]:.4g}"
        axes.plot([values[start]], [scores[start]], "o", color=GREY, fillstyle="none", label=text)
    text = f"best, {values[best]:.4g}: {scores[best]:.4g}"
    axes.plot([values[best]], [scores[best]], "o", color=COLOURS[0], markersize=7, label=text)


def _history(axes: Any, scores: Sequence[float], label: str) -> None:
    so_far = [max(scores[: i + 1]) for i in range(len(scores))]
    axes.plot(range(1, len(scores) + 1), scores, ".", color=COLOURS[1], label="each trial")
    axes.step(
        range(1, len(scores) + 1), so_far, where="post", color=COLOURS[0], label="best so far"
    )
    axes.set_xlabel("trial")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, loc="lower right", frameon=False)


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
