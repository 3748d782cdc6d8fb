"""What a search found: the best values, all that was tried, a table and a picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.learning.search import Trial, Values

__all__ = ["Tuned"]


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best values of a search, and all that was tried.

    names: of the numbers; values: the best of each. settings: the same as ``--set`` takes them.
    recipe: the recipe's text with these values in it and without ``tune:``. judged: what the score
    is. start: the trial of the recipe's own values. merges: how many merges were computed for it.
    """

    names: tuple[str, ...]
    values: Values
    score: float
    trials: tuple[Trial, ...]
    settings: tuple[str, ...]
    recipe: str
    method: str
    judged: str
    seed: int
    stamp: str
    start: int | None = None
    merges: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, the same for the same search."""
        return {
            "values": dict(zip(self.names, self.values, strict=True)),
            "score": self.score,
            "settings": list(self.settings),
            "method": self.method,
            "judged": self.judged,
            "seed": self.seed,
            "start": self.start,
            "stamp": self.stamp,
            "trials": [
                {"values": dict(zip(self.names, t.values, strict=True)), "score": t.score}
                for t in self.trials
            ],
        }

    def picture(self, path: str | Path) -> Path:
        """Draw the curve into a file, whose ending says what kind: .png, .svg or .pdf."""
        from merge.analysis.trials import draw_trials

        rows, scores = [t.values for t in self.trials], [t.score for t in self.trials]
        label = self.judged if len(self.judged) <= 44 else f"{self.judged[:41]}..."
        return draw_trials(Path(path), self.names, rows, scores, self.start, label)

    def told(self) -> str:
        """The outcome in a line."""
        pairs = ", ".join(f"{n} = {v:g}" for n, v in zip(self.names, self.values, strict=True))
        first = "" if self.start is None else f", {self.trials[self.start].score:.6g} as written"
        return f"{pairs}: {self.score:.6g}{first} ({self.judged}; {len(self.trials)} trials)"

    def __str__(self) -> str:
        rows = [[*self.names, "score", ""]]
        for i, trial in enumerate(self.trials):
            best = trial.values == self.values
            mark = "best" if best else "as written" if i == self.start else ""
            rows.append([*(f"{v:g}" for v in trial.values), f"{trial.score:.6g}", mark])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{c:>{w}}" for c, w in zip(r, widths, strict=True)) for r in rows]
        return "\n".join(line.rstrip() for line in lines)
