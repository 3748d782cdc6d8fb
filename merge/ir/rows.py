"""Rows of a new matrix as means of rows of others, as when vocabularies are put together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["RowTable"]


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """For each output row the rows of the operands whose mean it is.

    Row i is the mean of ``operand[e], row[e]`` for e in ``begin[i]:end[i]``, added up in that
    order; without entries it is zero. Most rows have exactly one entry. Rows of one and the same
    ``begin`` and ``end`` are equal and need computing once: many rows may share a long list.
    The arrays are read-only. Tables are equal when their digests are.

    >>> table = RowTable.of([[(0, 2)], [], [(0, 0), (1, 5)]])
    >>> table.count, table.begin.tolist(), table.end.tolist(), table.row.tolist()
    (3, [0, 1, 1], [1, 1, 3], [2, 0, 5])
    """

    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    operand: NDArray[np.int32]
    row: NDArray[np.int64]
    digest: str  # SHA-256 of the arrays

    @property
    def count(self) -> int:
        """Rows of the output."""
        return len(self.begin)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowTable) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<table of {self.count} rows, {self.digest[:8]}>"

    @classmethod
    def from_spans(cls, begin: Any, end: Any, operand: Any, row: Any) -> RowTable:
        """The table of these arrays, which are copied; ValueError when they do not fit together."""
        import numpy as np

        starts, ends = np.array(begin, np.int64), np.array(end, np.int64)
        operands, rows = np.array(operand, np.int32), np.array(row, np.int64)
        if starts.ndim != 1 or starts.shape != ends.shape or operands.shape != rows.shape:
            raise ValueError("begin and end, operand and row must be pairs of equally long vectors")
        if len(starts) and not (starts.min() >= 0 and ends.max() <= len(rows)):
            raise ValueError("begin and end must lie within the entries")
        if (starts > ends).any() or (len(rows) and min(operands.min(), rows.min()) < 0):
            raise ValueError(
                "a begin must not lie after its end, nor an operand or row be negative"
            )
        digest = hashlib.sha256()
        for array in (starts, ends, operands, rows):
            digest.update(
                f"{len(array)} ".encode() + array.astype(array.dtype.newbyteorder("<")).data
            )
            array.flags.writeable = False
        return cls(starts, ends, operands, rows, digest.hexdigest())

    @classmethod
    def from_csr(cls, indptr: Any, operand: Any, row: Any) -> RowTable:
        """The table whose row i has the entries ``indptr[i]:indptr[i + 1]``."""
        import numpy as np

        bounds = np.asarray(indptr, np.int64)
        return cls.from_spans(bounds[:-1], bounds[1:], operand, row)

    @classmethod
    def single(cls, operand: Any, row: Any) -> RowTable:
        """One entry a row: ``row[i]`` of ``operand[i]``, or zero where ``row[i]`` is negative.

        >>> RowTable.single([0, 0, 1], [4, -1, 2]) == RowTable.of([[(0, 4)], [], [(1, 2)]])
        True
        """
        import numpy as np

        rows = np.asarray(row, np.int64)
        there = rows >= 0
        operands = np.broadcast_to(np.asarray(operand, np.int32), rows.shape)
        indptr = np.concatenate([[0], np.cumsum(there)])
        return cls.from_csr(indptr, operands[there], rows[there])

    @classmethod
    def of(cls, entries: Sequence[Sequence[tuple[int, int]]]) -> RowTable:
        """The table of lists of (operand, row), for small ones."""
        flat = [entry for row in entries for entry in row]
        indptr = [0]
        for row in entries:
            indptr.append(indptr[-1] + len(row))
        return cls.from_csr(indptr, [o for o, _ in flat], [r for _, r in flat])

    def identity_of(self, rows: Sequence[int]) -> int | None:
        """The operand that the output is, unchanged; None where it is something new.

        rows: how many each operand has.

        >>> RowTable.of([[(1, 0)], [(1, 1)]]).identity_of([9, 2])
        1
        """
        import numpy as np

        if not self.count or not (self.end - self.begin == 1).all():
            return None
        first = int(self.operand[self.begin[0]])
        if first >= len(rows) or rows[first] != self.count:
            return None
        same = (self.operand[self.begin] == first).all()
        return first if same and (self.row[self.begin] == np.arange(self.count)).all() else None

    def used(self) -> list[int]:
        """The operands that some row is of, in order."""
        import numpy as np

        return [int(i) for i in np.unique(self.operand)]

    def over(self, kept: Sequence[int]) -> RowTable:
        """The same rows where only the operands ``kept`` remain, numbered anew.

        >>> RowTable.of([[(3, 7)]]).over([1, 3]) == RowTable.of([[(1, 7)]])
        True
        """
        import numpy as np

        if list(kept) == list(range(len(kept))):
            return self
        numbers = np.searchsorted(np.asarray(kept), self.operand)
        return RowTable.from_spans(self.begin, self.end, numbers, self.row)

    def check(self, rows: Sequence[int]) -> None:
        """PlanError where an entry is of no operand, or beyond its rows. rows: of each operand."""
        import numpy as np

        if not len(self.row):
            return
        most = int(self.operand.max())
        if most >= len(rows):
            raise PlanError(
                "a row of a missing operand is asked for", found=most, expected=len(rows)
            )
        wrong = np.flatnonzero(self.row >= np.asarray(rows, np.int64)[self.operand])
        if len(wrong):
            at = int(wrong[0])
            raise PlanError(
                "a row beyond the end of a tensor is asked for",
                found=f"row {self.row[at]} of operand {self.operand[at]}",
                expected=f"at most {rows[self.operand[at]] - 1}",
            )
