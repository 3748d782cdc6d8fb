"""A merge with coefficients as expressions: what the engine streams into files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merge.errors import PlanError
from merge.ir.checkpoint import combine
from merge.ir.derived import Whole
from merge.ir.expr import Expr, Parameter, linear_sum
from merge.learning.coefficients import BASE, Block, Coefficients
from merge.learning.prepare import Preparation
from merge.methods.core.spectral import scratch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["merged_tensor"]


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
    update = _whole(name, deltas, block, prepare, vocabulary, base)
    return linear_sum([(own, base), (1.0, update)])


def _whole(
    name: str,
    deltas: Sequence[Expr],
    block: Block,
    prepare: Preparation,
    vocabulary: bool | None,
    base: Expr,
) -> Whole:
    """What the parts, times their coefficients, add to the base."""
    values: tuple[float, ...] = tuple(v for row in block.values[: len(deltas)] for v in row)
    parameters: dict[str, Parameter] = {
        "tensor": name,
        "kind": block.kind,
        "prepare": prepare.which,
        "value": prepare.value,
        "seed": prepare.seed,
        "thresholds": prepare.thresholds,
        "vocabulary": vocabulary,
        "values": values,
    }
    numel = 1
    for size in base.shape:
        numel *= size
    thin = prepare.is_factored(base.shape, vocabulary)
    held = numel * 3 + (scratch(base.shape, len(deltas)) if thin else numel * len(deltas))
    return Whole(
        "learned_merge",
        update,
        tuple(deltas),
        tuple(sorted(parameters.items())),
        base.shape,
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
) -> Tensor:
    """The sum of the parts of the differences times their coefficients."""
    import torch

    rows = torch.tensor(values, dtype=torch.float64).view(len(deltas), -1)
    how = Preparation(prepare, value, bool(thresholds), seed, thresholds)  # type: ignore[arg-type]
    shape = deltas[0].shape
    made = how(tensor, [d.clone() for d in deltas], vocabulary)
    out = torch.zeros_like(deltas[0]) if made.origin is None else made.origin.clone()
    for row, part in zip(rows, made.parts, strict=True):
        if bool(row.any()):
            part.add_to(out, row, kind)  # type: ignore[arg-type]
    return out.view(shape)
