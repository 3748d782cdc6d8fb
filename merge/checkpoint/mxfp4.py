"""MXFP4: 32 numbers of four bits with a common power of two (OCP Microscaling Formats 1.0).

A byte holds two codes, the first one in its low half. A code is a sign, two bits of exponent and
one of mantissa; the scale is 2 to the power of (byte - 127). Experts are stored as (experts,
outputs, inputs) and used as (experts, inputs, outputs), which is how gpt-oss names its weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from merge.ir.derived import Whole, concat, window
from merge.ir.dtypes import DType
from merge.ir.expr import Expr

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCKS", "CODES", "GROUP", "MXFP4", "POWERS", "expert_values", "experts"]

MXFP4 = "mxfp4"
BLOCKS = "_blocks"
POWERS = "_scales"
"""Ends of the names of codes and scales; before them stands what the model calls the weight."""

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of a code stand for; the fourth is the sign."""

GROUP = 32
"""Codes that have a scale in common."""

_PIECE = 1 << 18
"""Codes that are looked up at a time: what is held beside the expert itself."""


def experts(blocks: Expr, scales: Expr, dtype: DType) -> Expr:
    """A stack of experts (experts, inputs, outputs), of which one at a time is held in memory.

    blocks: bytes (experts, outputs, groups, 16). scales: bytes (experts, outputs, groups).
    """
    count, outputs, groups, _ = blocks.shape
    shape, numel = (groups * GROUP, outputs), groups * GROUP * outputs
    scratch = numel // 2 + 3 * min(numel, _PIECE)
    parts = [
        Whole(MXFP4, expert_values, (codes, powers), (), shape, dtype, scratch)
        for codes, powers in zip(_split(blocks), _split(scales), strict=True)
    ]
    return concat(parts, (count, *shape))


def _split(stack: Expr) -> list[Expr]:
    """The stack's members, along its first axis."""
    shape = stack.shape[1:]
    return [window(stack, i * math.prod(shape), shape) for i in range(stack.shape[0])]


def expert_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """The weights (inputs, outputs) of one expert in float32.

    blocks: bytes (outputs, groups, 16). scales: bytes (outputs, groups). Computed in bfloat16,
    which holds each product exactly, since half the bytes are turned in half the time.
    """
    import torch

    where = blocks.device
    values = torch.tensor([*CODES, *(-c for c in CODES)], dtype=torch.bfloat16, device=where)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    both = pairs.view(torch.float32).view(-1)  # a byte's two values, moved as one
    outputs, groups = scales.shape
    powers = scales.view(torch.float8_e8m0fnu).to(torch.bfloat16).unsqueeze(-1)
    out = torch.empty(groups * GROUP, outputs, dtype=torch.bfloat16, device=where)
    rows = max(1, _PIECE // (groups * GROUP))
    for first in range(0, outputs, rows):
        part = slice(first, first + rows)
        found = both.index_select(0, blocks[part].reshape(-1).int()).view(torch.bfloat16)
        found = found.view(-1, groups, GROUP) * powers[part]
        out[:, part] = found.view(-1, groups * GROUP).T
    return out.float()
