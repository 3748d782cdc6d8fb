"""A heat map of numbers by row and column, such as coefficients by layer and task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge.analysis.figure import figure

__all__ = ["draw_heat"]

_NAMED = 40  # rows that are named
_WRITTEN = 200  # cells whose number is written into them


def draw_heat(
    path: Path,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    label: str,
) -> Path:
    """Draw ``values`` (rows by columns) into a file; white is 0, what is missing is grey.

    label: what the numbers are. Numbers are written into the cells where there is room.
    """
    height = min(24.0, max(3.0, 0.26 * len(rows) + 1.6))
    width = max(4.8, 0.75 * len(columns) + 3.0)
    largest = max((abs(v) for row in values for v in row if math.isfinite(v)), default=1.0) or 1.0
    with figure(path, width, height) as drawn:
        axes = drawn.subplots()
        shown = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        axes.set_facecolor("#d9d9d9")
        axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
        every = -(-len(rows) // _NAMED)
        named = list(range(0, len(rows), every))
        axes.set_yticks(named, [_short(rows[i]) for i in named], fontsize=7)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)
        if len(rows) * len(columns) <= _WRITTEN:
            _write(axes, values, largest)
        drawn.colorbar(shown, ax=axes, label=label, shrink=0.8)
    return path


def _write(axes: Any, values: Sequence[Sequence[float]], largest: float) -> None:
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if math.isfinite(value):
                colour = "white" if abs(value) > 0.6 * largest else "#222222"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"...{name[-37:]}"
