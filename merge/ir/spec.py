"""What a tensor is, apart from its data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from merge.ir.dtypes import DType

__all__ = ["TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape of one tensor.

    A name is data: it may hold slashes and never becomes a path. ``folder`` is where its file lies
    in a checkpoint of several folders ('' at the top); there the name has the folder in front,
    divided by a slash, so that it is unique.

    >>> from merge.ir.dtypes import BF16
    >>> TensorSpec("w", BF16, (3, 4)).nbytes
    24
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    folder: str = ""

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.bits // 8

    @property
    def name_in_file(self) -> str:
        """The name without the folder in front."""
        return self.name.removeprefix(f"{self.folder}/") if self.folder else self.name

    def named(self, name: str) -> TensorSpec:
        """The same tensor under another name."""
        return replace(self, name=name)

    def cast(self, dtype: DType | None) -> TensorSpec:
        """The same tensor stored as ``dtype``; only floats are cast, None changes nothing."""
        if dtype is None or self.dtype.kind != "float":
            return self
        return replace(self, dtype=dtype)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.name}{list(self.shape)}"
