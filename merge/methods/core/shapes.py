"""What the axes of a tensor mean to a method: rows, matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["not_a_matrix", "row_length"]

_LONGEST = 8  # times the short side: longer matrices are taken for vocabularies
_SMALL = 32  # no stack of matrices has a side below this, and no kernel of a convolution one above


def row_length(shape: tuple[int, ...]) -> int:
    """Elements of a row: what one output unit reads.

    The last axis of a matrix and of a stack of matrices; a vector is one row; in the kernel of a
    convolution (a third or later axis below 32) all axes but the first.

    >>> row_length((8, 64)), row_length((5,)), row_length((4, 64, 128)), row_length((8, 16, 3, 3))
    (64, 5, 128, 144)
    """
    if len(shape) > 2 and min(shape[2:]) < _SMALL:
        return math.prod(shape[1:])
    return shape[-1] if shape else 1


def not_a_matrix(
    shape: tuple[int, ...], _parameters: Mapping[str, Any], vocabulary: bool | None = None
) -> bool:
    """Whether a tensor is no linear map between features, for methods that decompose those.

    A map has two axes of at least 2. The rows of a vocabulary are tokens, and their directions
    would cost the most of all. Where nobody knows which tensors are vocabularies, it is those with
    one axis more than 8 times as long as the other.

    >>> [not_a_matrix(s, {}) for s in ((512, 4096), (151936, 4096), (64,), (8, 16, 3, 3))]
    [False, True, True, True]
    >>> not_a_matrix((32000, 4096), {}, vocabulary=True), not_a_matrix((8, 4096), {}, False)
    (True, False)
    """
    if len(shape) != 2 or min(shape) < 2:
        return True
    return max(shape) > _LONGEST * min(shape) if vocabulary is None else vocabulary
