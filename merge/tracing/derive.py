"""Derive the symmetry of a module: trace a twin, read the groups off, check, give names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from merge.symmetry.symmetry import Symmetry
from merge.tracing.check import Check, verified
from merge.tracing.concrete import concrete
from merge.tracing.layered import by_layer
from merge.tracing.naming import Called, called, renamed
from merge.tracing.precision import twin_of
from merge.tracing.trace import Pick, all_of, trace

__all__ = ["Derived", "derive"]


@dataclass(frozen=True, slots=True)
class Derived:
    """A verified symmetry, what its groups are called, and how well the check held."""

    symmetry: Symmetry
    names: Mapping[str, Called]
    deviation: float
    tolerance: float


def derive(
    module: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    free_outputs: bool = False,
    pick: Pick = all_of,
    seed: int = 0,
) -> Derived:
    """The symmetry of ``module``, derived from one run with ``inputs`` and verified.

    The module itself is left alone: a twin with random weights in float64 is run. ``free_outputs``
    lets the outputs be permuted too; the groups that index them are marked. ``pick`` takes what
    counts as output from what the module returns.
    """
    twin = twin_of(module, seed)
    inputs = _double(inputs)
    traced = trace(twin, inputs, free_outputs=free_outputs, pick=pick)
    found, outputs = concrete(traced)
    moving = outputs if free_outputs else None
    check = Check(twin, inputs, moving, single=traced.single, pick=pick)
    symmetry = verified(check, found)
    notes = tuple(
        f"the operator {name} is not known ({count} calls): what it touches is frozen"
        for name, count in sorted(traced.unknown.items())
    )
    symmetry = by_layer(symmetry)
    names = called(symmetry)
    text = {group: names[group].name for group in symmetry.groups}
    symmetry = renamed(replace(symmetry, notes=(*symmetry.notes, *notes)), text)
    return Derived(symmetry, {c.name: c for c in names.values()}, check.worst, check.tolerance)


def _double(value: Any) -> Any:
    """Inputs with floats in float64."""
    if hasattr(value, "is_floating_point"):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: _double(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_double(v) for v in value]
    return value
