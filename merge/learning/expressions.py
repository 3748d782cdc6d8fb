"""A merge with coefficients as expressions: what the engine streams into files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from merge.errors import PlanError
from merge.ir.checkpoint import combine
from merge.ir.derived import Whole, concat, window
from merge.ir.expr import Expr, Parameter, linear_sum
from merge.learning.coefficients import BASE, Block, Coefficients
from merge.learning.parts import Part
from merge.learning.prepare import Preparation
from merge.methods.core.spectral import scratch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["merged_tensor"]

_RUN = 1 << 19  # elements of a large tensor that are worked on together


def merged_tensor(
    name: str,
    base: Expr,
    experts: Sequence[tuple[Expr, bool]],
    coefficients: Coefficients,
    prepare: Preparation,
    vocabulary: bool | None = None,
) -> Expr:
    """The tensor ``name`` of the merge: a sum where that is all, else a function of the whole.

    experts: each expert's tensor, and whether that is a difference to the base already.
    """
    block = coefficients.block_of(name)
    deltas = [e if is_delta else combine(name, [(1.0, e), (-1.0, base)]) for e, is_delta in experts]
    has_base = BASE in coefficients.operands
    own = 1.0
    if has_base:
        row = block.values[-1]
        if len(set(row)) > 1:
            raise PlanError(
                "the base has one coefficient a tensor", tensor=name, found=f"{len(row)} numbers"
            )
        own = row[0]
    if not any(any(row) for row in block.values[: len(experts)]) and prepare.which != "cart":
        return linear_sum([(own, base)])
    if block.kind == "whole":
        scales = [row[0] for row in block.values[: len(experts)]]
        shares = prepare.shares(base.shape, scales, vocabulary)
        if shares is not None:
            return linear_sum([(own, base), *zip(shares, deltas, strict=True)])
    thin = prepare.is_factored(base.shape, vocabulary)
    pieces = 1 if thin or (prepare.which == "ties" and not prepare.thresholds) else _pieces(base)
    parts = [
        _whole(name, deltas, block, prepare, vocabulary, base, number, pieces)
        for number in range(pieces)
    ]
    return linear_sum([(own, base), (1.0, concat(parts, base.shape))])


def _pieces(base: Expr) -> int:
    """How many equal runs of rows a large tensor is worked on in, where its elements are apart."""
    rows, numel = (base.shape or (1,))[0], math.prod(base.shape)
    divisors = (d for d in range(1, rows + 1) if rows % d == 0)
    return next((d for d in divisors if numel // d <= _RUN), 1)


def _whole(
    name: str,
    deltas: Sequence[Expr],
    block: Block,
    prepare: Preparation,
    vocabulary: bool | None,
    base: Expr,
    number: int,
    pieces: int,
) -> Whole:
    """What run ``number`` of the parts, times their coefficients, adds to the base."""
    shape, numel = base.shape, math.prod(base.shape) // pieces
    rows = block.values[: len(deltas)]
    if pieces > 1:
        shape = (shape[0] // pieces, *shape[1:])
        if block.kind == "row":
            rows = tuple(row[number * shape[0] : (number + 1) * shape[0]] for row in rows)
    parameters: dict[str, Parameter] = {
        "tensor": name,
        "kind": block.kind,
        "prepare": prepare.which,
        "value": prepare.value,
        "seed": prepare.seed,
        "thresholds": prepare.thresholds,
        "vocabulary": True if pieces > 1 else vocabulary,  # a run of rows may look like a matrix
        "values": tuple(v for row in rows for v in row),
        "start": number * numel,
    }
    thin = prepare.is_factored(base.shape, vocabulary)
    held = numel * 3 + (scratch(base.shape, len(deltas)) if thin else 0)
    if prepare.joint:
        held += numel * len(deltas)
    return Whole(
        "learned_merge",
        update,
        tuple(window(d, number * numel, shape) for d in deltas),
        tuple(sorted(parameters.items())),
        shape,
        base.dtype,
        held,
    )


def update(
    *deltas: Tensor,
    tensor: str,
    kind: str,
    prepare: str,
    value: float,
    seed: int,
    thresholds: tuple[float, ...],
    vocabulary: bool | None,
    values: tuple[float, ...],
    start: int,
) -> Tensor:
    """The sum of the parts of the differences times their coefficients.

    start: the flat index in the tensor of the differences' first element.
    """
    import torch

    rows = torch.tensor(values, dtype=torch.float64).view(len(deltas), -1)
    how = Preparation(prepare, value, bool(thresholds), seed, thresholds)  # type: ignore[arg-type]
    out = torch.zeros_like(deltas[0])
    if how.joint:
        made = how(tensor, deltas, vocabulary)
        if made.origin is not None:
            out += made.origin
        parts: Iterable[Part] = made.parts
    else:
        parts = (how.one(i, tensor, d, start) for i, d in enumerate(deltas))
    for row, part in zip(rows, parts, strict=True):
        part.add_to(out, row, kind)  # type: ignore[arg-type]
    return out
