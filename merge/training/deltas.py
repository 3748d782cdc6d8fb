"""Differences of experts to a base, as what coefficients scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from merge.errors import PlanError
from merge.families.layers import place_of
from merge.learning.parts import Dense, Factored, Part

__all__ = ["Delta", "directions_of", "layer_of", "moved", "numbered", "parts_of"]

Delta = Mapping[str, "Tensor | Part"]
"""An expert's differences by the tensors' names: dense, or in parts of `merge.learning`."""


def parts_of(
    base: Mapping[str, Tensor], experts: Mapping[str, Delta], seed: int
) -> dict[str, list[Part]]:
    """The differences of each tensor that all experts have; PlanError where they do not fit."""
    out: dict[str, list[Part]] = {}
    for name, origin in base.items():
        held = [d[name] for d in experts.values() if name in d]
        if len(held) < len(experts) or not origin.is_floating_point():
            continue
        for label, value in zip(experts, held, strict=True):
            shape = _shape(value)
            if shape != tuple(origin.shape):
                raise PlanError(
                    "a difference has another shape than its weight",
                    tensor=name,
                    expert=label,
                    found=list(shape),
                    expected=list(origin.shape),
                )
        out[name] = [
            Dense(v.detach().to(origin), name, seed) if isinstance(v, Tensor) else v for v in held
        ]
    if not out:
        raise PlanError(
            "the experts have no difference to a weight of the network in common",
            found=", ".join(list(next(iter(experts.values()), {}))[:3]) or "no differences",
            expected=f"names such as {', '.join(list(base)[:3])}",
        )
    return out


def _shape(delta: Tensor | Part) -> tuple[int, ...]:
    if isinstance(delta, Factored):
        return delta.left.shape[0], delta.right.shape[0]
    return tuple(delta.value.shape if isinstance(delta, Dense) else delta.shape)


def directions_of(parts: Mapping[str, Sequence[Part]]) -> dict[str, int]:
    """Singular directions of tensors whose differences are all in factors."""
    return {
        name: max(len(p.s) for p in own if isinstance(p, Factored))
        for name, own in parts.items()
        if all(isinstance(p, Factored) for p in own)
    }


def moved(part: Part, fn: Callable[[Tensor], Tensor]) -> Part:
    if isinstance(part, Dense):
        return Dense(fn(part.value), part.tensor, part.seed)
    if isinstance(part, Factored):
        return Factored(fn(part.left), fn(part.s), fn(part.right))
    codes, scales = fn(part.codes), fn(part.scales)
    return type(part)(codes, scales, part.shape, part.tensor, part.seed)


def numbered(deltas: Sequence[Delta]) -> dict[str, Delta]:
    return {f"expert {i}": d for i, d in enumerate(deltas)}


def layer_of(name: str) -> str | None:
    """The layer that a tensor is in, as text; None for what is in none."""
    found = place_of(name)
    return None if found is None else f"{found[0]}.{found[1]}".lstrip(".")
