"""What an extraction kept of each module, as data, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ExtractReport", "ModuleReport"]


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module, or one tensor that is no module's.

    how: ``product`` (exact, from the factors of adapters), ``svd``, ``whole`` (stored as it is),
    ``bias`` (stored as it is), or why nothing of it is kept. energy: the share of the sum of
    squares of the difference that is kept. error: the Frobenius norm of what is lost, as a part of
    that of the difference. square: the sum of squares of the difference.
    """

    module: str
    how: str
    shape: tuple[int, ...]
    rank: int | None = None
    energy: float = 1.0
    error: float = 0.0
    square: float = 0.0


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """All modules that differ. notes: what is not kept, and what a reader may want to know."""

    modules: tuple[ModuleReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """The share of the sum of squares of all differences that is kept."""
        total = math.fsum(m.square for m in self.modules)
        return math.fsum(m.square * m.energy for m in self.modules) / total if total else 1.0

    @property
    def error(self) -> float:
        """The Frobenius norm of all that is lost, as a part of that of all differences."""
        total = math.fsum(m.square for m in self.modules)
        lost = math.fsum(m.square * m.error**2 for m in self.modules)
        return math.sqrt(lost / total) if total else 0.0

    def to_json(self) -> dict[str, object]:
        """As plain data: what extract_report.json holds."""
        return {
            "energy": self.energy,
            "relative_error": self.error,
            "notes": list(self.notes),
            "modules": [
                {
                    "module": m.module,
                    "how": m.how,
                    "shape": list(m.shape),
                    "rank": m.rank,
                    "energy": m.energy,
                    "relative_error": m.error,
                    "norm": math.sqrt(m.square),
                }
                for m in self.modules
            ],
        }

    @property
    def text(self) -> str:
        """extract_report.json."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def __str__(self) -> str:
        rows: list[Sequence[str]] = [("module", "shape", "how", "rank", "energy", "error")]
        rows += [
            (
                m.module,
                "x".join(map(str, m.shape)),
                m.how,
                "" if m.rank is None else str(m.rank),
                f"{m.energy:.4f}",
                f"{m.error:.2e}",
            )
            for m in self.modules
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(f"{c:{w}}" if i < 3 else f"{c:>{w}}"
                      for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows
        ]  # fmt: skip
        lines.append(f"all: {self.energy:.4f} of the energy kept, relative error {self.error:.2e}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])
