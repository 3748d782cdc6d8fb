"""A checkpoint after couplings, lazily: in the widths of another, one tensor at a time.

Where all that moves in a tensor is a permutation its bytes are moved; else it is computed whole, in
the arithmetic's type, when it is written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge.alignment.moved import moved
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import Whole
from merge.ir.expr import Expr
from merge.symmetry.roles import inputs_of, starred_writers
from merge.symmetry.symmetry import Layout, Symmetry
from merge.transport.coupling import Coupling, Couplings, Roles, permutation_of, transported
from merge.transport.scales import Rescaled

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["carried", "roles_of"]


def roles_of(symmetry: Symmetry) -> Roles:
    """What tells readers from writers in a symmetry."""
    inputs = inputs_of(symmetry)
    return Roles(inputs, starred_writers(symmetry, inputs))


def carried(
    checkpoint: Checkpoint,
    source: Symmetry,
    target: Symmetry,
    couplings: Couplings,
    factors: Mapping[str, Rescaled] | None = None,
) -> Checkpoint:
    """``checkpoint``, of symmetry ``source``, in the sizes of ``target``.

    factors: what is done to tensors at last, from `merge.transport.scales.rescaled`.
    """
    factors = factors or {}
    roles = roles_of(source)
    element: dict[str, Any] = {}
    for group, coupling in couplings.items():
        if (found := permutation_of(coupling)) is not None:
            element |= {group: found[0], **found[1]}
    still = [
        n
        for n in checkpoint.tensors
        if n not in factors
        and all(g in element or not _is_moved(g, couplings) for g in source.tensors[n].groups())
    ]
    whole = checkpoint.tensors
    ordered = _reordered(checkpoint, source, element, still)
    tensors: dict[str, Expr] = {}
    for name in whole:
        if name in ordered:
            tensors[name] = ordered[name]
            continue
        layout = source.tensors[name]
        own, inner = _in_stack(name, layout, couplings)
        tensors[name] = _computed(
            name, whole[own], layout, target.tensors[name].shape, inner, roles, factors.get(name)
        )
    for second, first in checkpoint.tied.items():
        tensors[second] = tensors[first]
    return replace(checkpoint, tensors=tensors, label=f"transported({checkpoint.label})")


def _reordered(
    checkpoint: Checkpoint, source: Symmetry, element: Mapping[str, Any], names: list[str]
) -> Mapping[str, Expr]:
    """The tensors ``names`` after a permutation."""
    needed = {m for n in names for m in (n, *source.tensors[n].siblings)}
    part = replace(checkpoint, tensors={n: checkpoint.tensors[n] for n in needed})
    found = moved(part, source, element).tensors
    return {n: found[n] for n in names}


def _is_moved(group: str, couplings: Couplings) -> bool:
    return group in couplings or any(
        _is_moved(group, inner) for c in couplings.values() for inner in c.below.values()
    )


def _in_stack(name: str, layout: Layout, couplings: Couplings) -> tuple[str, Couplings]:
    """The tensor whose values come to ``name``, and the couplings that hold in it."""
    stack = couplings.get(layout.stack) if layout.stack else None
    if stack is None:
        return name, couplings
    i = layout.member
    j = stack.plan.source_of(i)
    return layout.siblings[j], {**couplings, **stack.below.get((j, i), {})}


def _computed(
    name: str,
    expr: Expr,
    layout: Layout,
    shape: tuple[int, ...],
    couplings: Couplings,
    roles: Roles,
    factor: Rescaled | None,
) -> Expr:
    groups = set(layout.groups())
    held = {
        g: c
        for g, c in couplings.items()
        if g in groups or groups & {h for inner in c.below.values() for h in inner}
    }
    small = Roles({name: roles.inputs[name]}, roles.flipped)

    def function(values: Tensor) -> Tensor:
        found = transported(name, values, layout, held, small)
        if factor is None:
            return found
        return found * found.new_tensor(factor.scale) + factor.shift

    return Whole(
        f"transported {_digest(name, held, factor)}", function, (expr,), (), shape, expr.dtype,
        scratch=3 * max(math.prod(expr.shape), math.prod(shape)),
    )  # fmt: skip


def _digest(name: str, couplings: Couplings, factor: Rescaled | None) -> str:
    """What is done, in a word: SHA-256 over plans, pairs and factors."""
    import numpy as np

    digest = hashlib.sha256(name.encode())

    def add(coupling: Coupling) -> None:
        plan = coupling.plan
        arrays = (plan.mass,) if plan.entries is None else plan.entries
        for array in (*arrays, plan.a, plan.b):
            digest.update(f"{array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        for pair, inner in sorted(coupling.below.items()):
            for group, below in sorted(inner.items()):
                digest.update(f"{pair} {group} ".encode())
                add(below)

    for group, coupling in sorted(couplings.items()):
        digest.update(f"{group} ".encode())
        add(coupling)
    if factor is not None:
        digest.update(np.ascontiguousarray(factor.scale, np.float64).tobytes())
        digest.update(f" {factor.shift}".encode())
    return digest.hexdigest()
