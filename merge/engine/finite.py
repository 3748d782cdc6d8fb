"""NaN and infinity have names: which tensor of which source, how many, where first."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from merge.errors import MergeError, PlanError, SourceError
from merge.ir.expr import Read
from merge.ir.spec import TensorSpec

__all__ = ["Policy", "check_finite"]

Policy = Literal["error", "allow"]

_EIGHT_BIT = {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"}


def check_finite(
    tile: Tensor,
    policy: Policy,
    start: int,
    of: Read | TensorSpec,
    before: Tensor | None = None,
) -> None:
    """Raise unless every element of ``tile`` is finite.

    of: the input that was read, or the output that was computed. before: the output before it was
    rounded to its stored type, to tell an overflow of that type from a computed infinity.

    One sum decides in the good case: any NaN or infinity makes it one, and it costs a tenth of
    `torch.isfinite`. Only a sum that is not finite is looked at closely (it may have overflowed).
    """
    if policy == "allow" or tile.numel() == 0:
        return
    small = str(tile.dtype).removeprefix("torch.") in _EIGHT_BIT
    wide = tile.to(torch.float32) if small else tile
    total = wide.sum(dtype=torch.float32) if wide.dtype == torch.float16 else wide.sum()
    if math.isfinite(float(total)):
        return
    bad = ~torch.isfinite(wide.reshape(-1))
    count = int(bad.sum())
    if count:
        first = start + int(bad.nonzero()[0, 0])
        raise _error(wide.reshape(-1)[bad], count, first, of, before)


def _error(
    values: Tensor, count: int, first: int, of: Read | TensorSpec, before: Tensor | None
) -> MergeError:
    kinds = {"NaN": int(values.isnan().sum()), "infinite": int(values.isinf().sum())}
    found = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
    found = f"at least {found}, the first seen at index {first}"  # one tile was looked at
    if isinstance(of, Read):
        return SourceError(
            "an input holds numbers that are not finite",
            tensor=of.spec.name,
            model=of.source.identity,
            found=found,
            expected="finite numbers",
            do="that model is damaged or diverged; --allow-non-finite lets it pass",
        )
    if before is not None and bool(torch.isfinite(before).all()):
        return PlanError(
            f"a result is too large for {of.dtype.name}",
            tensor=of.name,
            found=f"{count} overflowing elements, the first at index {first}",
            expected=f"at most {torch.finfo(getattr(torch, of.dtype.name)).max:g}",
            do="store it wider: dtype bfloat16 or float32",
        )
    return PlanError(
        "the merge made numbers that are not finite",
        tensor=of.name,
        found=found,
        expected="finite numbers",
        do="check the weights in the recipe; --allow-non-finite lets it pass",
    )
