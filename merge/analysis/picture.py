"""Pictures of barriers, by matplotlib, which is optional: along the line, and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from merge.analysis.barrier import Curve, Estimate, LayerBarrier
from merge.analysis.figure import COLOURS, GREY, figure

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

_MOST = 32  # layers that are named in a picture


def draw(found: Drawn, path: Path) -> Path:
    """Draw losses along the lines, and each layer's share where that was measured, into a file."""
    layered = [x for x in found.lines if x.layers]
    with figure(path, 11.0 if layered else 6.0, 4.8) as drawn:
        axes = drawn.subplots(1, 2 if layered else 1, squeeze=False)[0]
        _losses(axes[0], found)
        if layered:
            _layers(axes[1], layered)
    return path


def _losses(axes: Any, found: Drawn) -> None:
    for line, colour in zip(found.lines, COLOURS, strict=False):
        for curve, style, of in ((line.test, "-", "test"), (line.train, ":", "train")):
            axes.plot(
                curve.t,
                [p.loss for p in curve.points],
                style,
                color=colour,
                label=f"{line.called}, {of}: barrier {curve.barrier:.3f}",
                linewidth=1.8 if of == "test" else 1.2,
            )
        _peak(axes, line.test, colour)
        if line.estimate is not None:
            ends = [line.train.points[0].loss, line.train.points[-1].loss]
            middle = sum(ends) / 2 + line.estimate.rise
            axes.plot([0.5], [middle], "x", color=colour, label=f"{line.called}, by curvature")
    test = found.lines[0].test
    ends = [test.points[0].loss, test.points[-1].loss]
    axes.plot([0, 1], ends, "--", color=GREY, linewidth=0.9, zorder=1)
    axes.plot([0, 1], ends, "o", color="#222222", markersize=5, zorder=4, clip_on=False)
    most = max(p.loss for line in found.lines for c in (line.test, line.train) for p in c.points)
    least = min(p.loss for line in found.lines for c in (line.test, line.train) for p in c.points)
    room = 0.08 * (most - least or 1.0)
    axes.set_ylim(least - room, most + room)  # an estimate may lie far away
    axes.set_xlim(-0.02, 1.02)
    names = (_short(found.first), _short(found.second))
    axes.set_xticks(
        [0, 0.25, 0.5, 0.75, 1], [f"0\n{names[0]}", "0.25", "0.5", "0.75", f"1\n{names[1]}"]
    )
    axes.set_xlabel("share of the second network, t")
    axes.set_ylabel("mean loss")
    _legend(axes)


def _peak(axes: Any, curve: Curve, colour: str) -> None:
    """The barrier between a curve and the line between its ends, where it is highest."""
    first, last = curve.points[0].loss, curve.points[-1].loss
    pairs = list(zip(curve.t, curve.points, strict=True))
    chords = [first + t * (last - first) for t, _ in pairs]
    rises = [p.loss - chord for (_, p), chord in zip(pairs, chords, strict=True)]
    k = rises.index(max(rises)) if curve.barrier > 0 else len(pairs) // 2
    if curve.barrier > 0:
        axes.plot([pairs[k][0]] * 2, [chords[k], pairs[k][1].loss], color=colour, linewidth=0.8)
    axes.annotate(
        f"barrier {curve.barrier:.3f}",
        (pairs[k][0], max(pairs[k][1].loss, chords[k])),
        xytext=(6, 5),
        textcoords="offset points",
        color=colour,
        fontsize=9,
    )


def _layers(axes: Any, lines: Sequence[Line]) -> None:
    names = [x.layer for x in lines[0].layers]
    step = 0.8 / len(lines)
    for k, (line, colour) in enumerate(zip(lines, COLOURS, strict=False)):
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
    axes.set_xlabel("layer")
    axes.set_ylabel("barrier (rise of the mean loss)")
    _legend(axes)


def _legend(axes: Any) -> None:
    """Below, where no line runs."""
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)


def _short(name: str) -> str:
    last = (name.rstrip("/").rpartition("/")[2] or name).removesuffix(".safetensors")
    return last if len(last) <= 28 else f"...{last[-25:]}"
