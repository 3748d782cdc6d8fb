"""Pictures of barriers, by matplotlib, which is optional: along the line, and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from merge.analysis.barrier import Curve, Estimate, LayerBarrier
from merge.errors import RecipeError, nearest

if TYPE_CHECKING:

    class Line(Protocol):
        """One way between the networks."""

        @property
        def called(self) -> str: ...
        @property
        def train(self) -> Curve: ...
        @property
        def test(self) -> Curve: ...
        @property
        def layers(self) -> tuple[LayerBarrier, ...]: ...
        @property
        def estimate(self) -> Estimate | None: ...

    class Drawn(Protocol):
        """What is drawn."""

        @property
        def first(self) -> str: ...
        @property
        def second(self) -> str: ...
        @property
        def lines(self) -> Sequence[Line]: ...


__all__ = ["draw"]

_KINDS = ("png", "svg", "pdf")
_COLOURS = ("#c1442e", "#1f6f8b", "#5b8c3a")  # told apart by those who see few colours, too
_MOST = 32  # layers that are named in a picture


def draw(found: Drawn, path: Path) -> Path:
    """Draw losses along the lines, and each layer's share where that was measured, into a file.

    The file's ending says what kind it is. RecipeError where matplotlib is not installed.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind not in _KINDS:
        near = nearest(kind, _KINDS)
        raise RecipeError(
            "this is no kind of picture that is drawn here",
            file=path,
            found=path.suffix or "no ending",
            expected=", ".join(f".{k}" for k in _KINDS),
            do=f"did you mean .{near}?" if near else None,
        )
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise RecipeError(
            "pictures are drawn by matplotlib, which is not installed",
            do="pip install 'hf-merge[plot]', or leave out the picture",
        ) from None
    layered = [x for x in found.lines if x.layers]
    figure = Figure(figsize=(11.0 if layered else 6.0, 4.8), layout="constrained")
    axes = figure.subplots(1, 2 if layered else 1, squeeze=False)[0]
    _losses(axes[0], found)
    if layered:
        _layers(axes[1], layered)
    figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return path


def _losses(axes: Any, found: Drawn) -> None:
    for line, colour in zip(found.lines, _COLOURS, strict=False):
        for curve, style, of in ((line.test, "-", "test"), (line.train, ":", "train")):
            axes.plot(
                curve.t,
                [p.loss for p in curve.points],
                style,
                color=colour,
                label=f"{line.called}, {of}: barrier {curve.barrier:.3f}",
            )
        if line.estimate is not None:
            ends = [line.train.points[0].loss, line.train.points[-1].loss]
            middle = sum(ends) / 2 + line.estimate.rise
            axes.plot([0.5], [middle], "x", color=colour, label=f"{line.called}, by curvature")
    most = max(p.loss for line in found.lines for c in (line.test, line.train) for p in c.points)
    least = min(p.loss for line in found.lines for c in (line.test, line.train) for p in c.points)
    room = 0.08 * (most - least or 1.0)
    axes.set_ylim(least - room, most + room)  # an estimate may lie far away
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"from {_short(found.first)} (0) to {_short(found.second)} (1)")
    axes.set_ylabel("loss")
    axes.set_title("along the line")
    _legend(axes)
    axes.grid(alpha=0.3)


def _layers(axes: Any, lines: Sequence[Line]) -> None:
    names = [x.layer for x in lines[0].layers]
    step = 0.8 / len(lines)
    for k, (line, colour) in enumerate(zip(lines, _COLOURS, strict=False)):
        places = [i - 0.4 + step * (k + 0.5) for i in range(len(names))]
        axes.bar(
            places,
            [x.alone for x in line.layers],
            step,
            color=colour,
            label=f"{line.called}, alone",
        )
        middles = list(range(len(names)))
        axes.plot(
            middles,
            [x.up_to for x in line.layers],
            ".-",
            color=colour,
            alpha=0.6,
            label=f"{line.called}, all up to it",
        )
    every = -(-len(names) // _MOST)
    shown = list(range(0, len(names), every))
    words = [_short(names[i]) for i in shown]
    if max(map(len, words)) * len(words) > 60:
        axes.set_xticks(shown, words, rotation=60, ha="right", fontsize=7)
    else:
        axes.set_xticks(shown, words)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("rise of the loss")
    axes.set_title("by layer")
    _legend(axes)
    axes.grid(alpha=0.3, axis="y")


def _legend(axes: Any) -> None:
    """Below, where no line runs."""
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _short(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2] or name
    return last if len(last) <= 28 else f"...{last[-25:]}"
