"""What a match found, in numbers: how alike the networks are, and how much was moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from merge.symmetry.elements import Element

__all__ = ["GroupReport", "Match", "Report", "moved_share"]


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One group. moved: share of its coordinates that are elsewhere now, between 0 and 1.

    score: cosine between the networks' tensors in which it stands, after the match; for activations
    the mean correlation of matched units. None where nothing was measured.
    """

    group: str
    size: int
    copies: int  # it was matched for each index of the groups that it depends on
    moved: float
    score: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """How the match went.

    objective: after each sweep, what was maximised; it never falls. before and after: cosine of the
    networks' weights as they were and aligned. moved: share of all coordinates that moved.
    """

    method: str
    objective: tuple[float, ...]
    converged: bool
    before: float | None
    after: float | None
    moved: float
    groups: tuple[GroupReport, ...]
    bytes_read: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.moved:.1%} of the coordinates of {len(self.groups)} groups"]
        lines[0] += " moved"
        if self.before is not None and self.after is not None:
            lines.append(f"  cosine of the weights {self.before:.4f} -> {self.after:.4f}")
        end = "" if self.converged else ", not yet at rest"
        lines.append(f"  {len(self.objective)} sweeps{end}")
        for g in self.groups:
            score = "" if g.score is None else f"  score {g.score:.4f}"
            lines.append(f"  {g.group:12} {g.size:6} x {g.copies:<4} moved {g.moved:6.1%}{score}")
        return "\n".join(lines + [f"  note: {n}" for n in self.notes])


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """The element that brings the second network to the first, and how it was found."""

    element: Element
    report: Report


def moved_share(symmetry: Symmetry, element: Element) -> tuple[float, Mapping[str, float]]:
    """Share of coordinates that are elsewhere, of all groups together and of each."""
    import numpy as np

    from merge.symmetry.elements import Scaled

    shares: dict[str, float] = {}
    moved = total = 0
    for name, move in element.items():
        index = move.index if isinstance(move, Scaled) else move
        if index.dtype.kind == "f":  # a matrix moves everything
            shares[name] = 1.0
            continue
        away = int(np.not_equal(index, np.arange(symmetry.groups[name].size)).sum())
        shares[name] = away / index.size
        moved, total = moved + away, total + index.size
    return moved / max(1, total), shares
