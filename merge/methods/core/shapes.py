"""What the axes of a tensor mean to a method: rows, matrices."""

from __future__ import annotations

import math

__all__ = ["row_length"]

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
