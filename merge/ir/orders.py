"""New orders of a tensor's coordinates: permutations as data, equal when their digests are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Permutation"]


@dataclass(frozen=True, slots=True, eq=False)
class Permutation:
    """Where the coordinates of an axis come from: coordinate i is coordinate ``index[i]`` before.

    index: (n,), or (m, n) for an axis that is ordered anew for each of the m indices of the
    tensor's first axis, as the units of each expert in a stack of experts. The array is read-only.
    Permutations are equal when their digests are.

    >>> Permutation.of([2, 0, 1]).of_earlier(Permutation.of([1, 0, 2])).index.tolist()
    [2, 1, 0]
    """

    index: NDArray[np.int64]
    digest: str  # SHA-256 of shape and index

    @property
    def size(self) -> int:
        """Coordinates of the axis."""
        return int(self.index.shape[-1])

    @property
    def stacked(self) -> bool:
        """Whether there is one order for each index of the tensor's first axis."""
        return self.index.ndim == 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutation) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<order of {self.size} coordinates, {self.digest[:8]}>"

    @classmethod
    def of(cls, index: Any) -> Permutation:
        """The permutation of this array, which is copied. ValueError when it is none.

        A stack of equal orders is that one order.
        """
        import numpy as np

        array = np.array(index, np.int64)
        if array.ndim not in (1, 2) or not array.size:
            raise ValueError(f"orders of one axis are a vector or a stack of them: {array.shape}")
        if (np.sort(array, axis=-1) != np.arange(array.shape[-1])).any():
            raise ValueError("an order names every coordinate exactly once")
        if array.ndim == 2 and (array == array[0]).all():
            array = array[0].copy()
        digest = hashlib.sha256(f"{array.shape} ".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).data)
        array.flags.writeable = False
        return cls(array, digest.hexdigest())

    def is_identity(self) -> bool:
        """Whether every coordinate stays where it is."""
        import numpy as np

        return bool((self.index == np.arange(self.size)).all())

    def of_earlier(self, earlier: Permutation, first: Permutation | None = None) -> Permutation:
        """Both as one: ``earlier`` is done before this one.

        first: this rearrangement's own order of the tensor's first axis, by which a stack of
        earlier orders is found.
        """
        if not self.stacked and not earlier.stacked:
            return Permutation.of(earlier.index[self.index])
        import numpy as np

        count = len(self.index if self.stacked else earlier.index)
        rows = np.arange(count) if first is None else first.index
        inner = earlier.index[rows] if earlier.stacked else earlier.index[None].repeat(count, 0)
        outer = self.index if self.stacked else self.index[None].repeat(count, 0)
        return Permutation.of(np.take_along_axis(inner, outer, axis=1))
