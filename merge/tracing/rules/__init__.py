"""What each operator does to labels, by story; `rule_of` finds the rule of an operator."""

from __future__ import annotations

from merge.tracing.rules import (
    arithmetic,
    contraction,
    convolution,
    factory,
    index,
    norm,
    parts,
    pointwise,
    reduction,
    scatter,
    shape,
)
from merge.tracing.rules.registry import rule_of

__all__ = [
    "arithmetic",
    "contraction",
    "convolution",
    "factory",
    "index",
    "norm",
    "parts",
    "pointwise",
    "reduction",
    "rule_of",
    "scatter",
    "shape",
]
