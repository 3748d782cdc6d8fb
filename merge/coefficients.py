"""Files of learned coefficients, looked at: by layer and expert, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.errors import SourceError
from merge.families.layers import place_of
from merge.learning.coefficients import Coefficients
from merge.recipe.learned import COEFFICIENTS

__all__ = ["Heat", "by_layer", "read_coefficients"]


@dataclass(frozen=True, slots=True)
class Heat:
    """Mean coefficients: rows are layers or blocks, columns experts; NaN where there is none."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data: row to column to number."""
        return {
            row: {
                c: None if math.isnan(v) else v for c, v in zip(self.columns, values, strict=True)
            }
            for row, values in zip(self.rows, self.values, strict=True)
        }

    def picture(self, path: str | Path) -> Path:
        """Draw it into a file, whose ending says what kind: .png, .svg or .pdf."""
        from merge.analysis.heat import draw_heat

        return draw_heat(Path(path), self.rows, self.columns, self.values, "coefficient")

    def __str__(self) -> str:
        rows = [["", *self.columns]]
        for row, values in zip(self.rows, self.values, strict=True):
            rows.append([row, *("" if math.isnan(v) else f"{v:.4f}" for v in values)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [f"{row[0]:{widths[0]}}"]
                + [f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)]
            ).rstrip()
            for row in rows
        )


def read_coefficients(place: str | Path) -> Coefficients:
    """The coefficients in a JSON file, or in the output of a recipe."""
    file = Path(place)
    if file.is_dir():
        file = file / COEFFICIENTS
    try:
        return Coefficients.from_json(file.read_bytes())
    except OSError as error:
        raise SourceError(f"coefficients cannot be read: {error.strerror}", file=file) from None
    except SourceError as error:
        raise error.at(file=file) from None


def by_layer(coefficients: Coefficients, *, blocks: bool = False) -> Heat:
    """The mean coefficient of each expert in each layer; what is in no layer by its module.

    A tensor counts once, however many numbers it has. blocks: by the blocks that were learned.
    """
    found: dict[str, list[Sequence[float]]] = {}
    table = coefficients.table()
    for name, block in coefficients.blocks.items():
        means = [table[name][o] for o in coefficients.operands]
        for tensor in block.tensors:
            found.setdefault(name if blocks else _layer(tensor), []).append(means)
    rows = tuple(found)
    values = tuple(
        tuple(math.fsum(column) / len(column) for column in zip(*found[row], strict=True))
        for row in rows
    )
    return Heat(rows, coefficients.operands, values)


def _layer(tensor: str) -> str:
    place = place_of(tensor)
    if place is None:
        return tensor.rpartition(".")[0] or tensor
    return f"{place[0]}.{place[1]}".lstrip(".")
