"""Read tensors that do not lie in one piece: transposes and other views, as pickles may hold them.

A tile's elements are looked up in the file's order and read in runs, so that memory stays within a
few tiles whatever the view, and a transpose costs one read for each run of a column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.ir.expr import TensorReader
from merge.ir.spec import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["StridedReader"]

_GAP = 64  # bytes between two elements that are read along: less than what another call costs
_PIECE = 1 << 18  # elements looked up at a time


@dataclass(frozen=True, slots=True)
class StridedReader:
    """Reads a view in row-major order. strides: elements from one index of an axis to the next.

    storage: reads the bytes from the view's first element on.
    """

    storage: TensorReader
    spec: TensorSpec
    strides: tuple[int, ...]

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the tensor's bytes from ``start`` on, whole elements."""
        import numpy as np

        size = self.spec.dtype.itemsize
        out = np.frombuffer(view, dtype=np.dtype(f"u{size}"))
        first = start // size
        for at in range(0, len(out), _PIECE):
            piece = out[at : at + _PIECE]
            self._gather(first + at, piece)

    def _gather(self, first: int, out: NDArray[np.unsignedinteger]) -> None:
        """Fill ``out`` with the elements from number ``first`` on."""
        import numpy as np

        size = out.itemsize
        index = np.arange(first, first + len(out), dtype=np.int64)
        offsets = np.zeros(len(out), dtype=np.int64)
        for length, stride in zip(reversed(self.spec.shape), reversed(self.strides), strict=True):
            index, along = np.divmod(index, length)
            offsets += along * stride
        order = np.argsort(offsets, kind="stable")
        offsets = offsets[order]
        cuts = np.flatnonzero(np.diff(offsets) * size > _GAP + size) + 1
        for run, places in zip(np.split(offsets, cuts), np.split(order, cuts), strict=True):
            block = np.empty(run[-1] - run[0] + 1, dtype=out.dtype)
            self.storage.read_into(int(run[0]) * size, block.view(np.uint8).data)
            out[places] = block[run - run[0]]
