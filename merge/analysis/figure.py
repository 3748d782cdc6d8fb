"""Figures drawn into files by matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge.errors import RecipeError, SinkError, nearest

__all__ = ["COLOURS", "GREY", "check_picture", "figure"]

COLOURS = ("#c1442e", "#1f6f8b", "#5b8c3a")  # told apart by those who see few colours, too
GREY = "#6b6b6b"
_KINDS = ("png", "svg", "pdf")
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf-merge",
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """An empty figure, written into ``path`` when the block ends; sizes in inches.

    The file's ending says what kind it is; the same figures give the same bytes. Errors as for
    `check_picture`, and SinkError where the file cannot be written.
    """
    check_picture(path)
    matplotlib: Any = import_module("matplotlib")
    figures: Any = import_module("matplotlib.figure")
    with matplotlib.rc_context(_STYLE):
        made = figures.Figure(figsize=(width, height), layout="constrained")
        yield made
        dates = {"png": "Creation Time", "svg": "Date", "pdf": "CreationDate"}
        kind = path.suffix.lower().lstrip(".")
        try:
            made.savefig(path, format=kind, dpi=150, metadata={dates[kind]: None})
        except OSError as error:
            raise SinkError("the picture cannot be written", file=path, found=error) from None


def check_picture(path: Path) -> None:
    """RecipeError unless a file of this name could be drawn; matplotlib is not loaded for that."""
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
    if find_spec("matplotlib") is None:
        raise RecipeError(
            "pictures are drawn by matplotlib, which is not installed",
            do="pip install 'hf-merge[plot]', or leave out the picture; --json has all figures",
        )
