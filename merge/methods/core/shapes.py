"""What the axes of a tensor mean to a method: rows, matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["not_a_matrix", "row_length"]

_LONGEST = 8  # times the short side: longer matrices are vocabularies, not maps between features
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


def not_a_matrix(shape: tuple[int, ...], _parameters: Mapping[str, Any]) -> bool:
    """Whether a tensor is no linear map between features, for methods that decompose those.

    A map has two axes of at least 2, one at most 8 times the other. Vocabularies are longer: their
    rows are tokens, and their directions would cost the most of all.

    >>> [not_a_matrix(s, {}) for s in ((512, 4096), (151936, 4096), (64,), (8, 16, 3, 3))]
    [False, True, True, True]
    """
    return len(shape) != 2 or min(shape) < 2 or max(shape) > _LONGEST * min(shape)
