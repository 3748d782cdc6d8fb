"""Merges that differ only in coefficients, computed once: the next is a sum of what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Apply, Expr, Linear, linear_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Span"]

Coefficients = dict[tuple[str, Expr], float]
"""Of each tensor's leaves: what is read, or what a method makes of what is read."""

_SCALE = "lambda_"
"""The argument in which the result of every method that has it is affine (a law of methods)."""


@dataclass(slots=True)
class _Direction:
    """A difference of a later checkpoint to the first, its tensors computed once they are used."""

    change: Coefficients
    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor] | None = None


@dataclass(slots=True)
class Span:
    """The values of checkpoints, one after another, as sums over those that came before.

    A checkpoint's tensors are linear combinations of leaves. While only coefficients change,
    ``theta(x) = theta_0 + sum_j s_j D_j``: theta_0 is the first, a D_j the difference of a later
    one to it, and s is found from the coefficients alone. Otherwise the checkpoint is computed,
    and becomes the new first. evaluate: computes tensors, in float32 at least. most: bytes that
    differences may take. computed: how often something was computed.

    What a sum is made of depends on the checkpoints before it, to the last bit; `follow` takes the
    place of `state` for those whose values are not needed again.
    """

    evaluate: Callable[[Checkpoint], Mapping[str, Tensor]]
    most: int = 4 << 30
    computed: int = 0
    _first: Coefficients | None = None
    _origin: Checkpoint | None = None
    _state: dict[str, Tensor] | None = None
    _directions: list[_Direction] = field(default_factory=list)
    _checked: bool = False
    _off: bool = False

    def state(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The tensors of a checkpoint; those of whole numbers as they were at first."""
        steps = self.follow(checkpoint)
        found = self._sum(steps)
        found.update((second, found[first]) for second, first in checkpoint.tied.items())
        if any(steps) and not self._checked and not self._as_foretold(checkpoint, found):
            self._off = True
            return self._sum(self.follow(checkpoint))
        return found

    def follow(self, checkpoint: Checkpoint) -> list[float]:
        """How the checkpoint is a sum of those before it; nothing is computed."""
        now = _coefficients(checkpoint)
        if not self._off and self._first is not None and self._same_leaves(now, checkpoint):
            change = _difference(now, self._first)
            steps = self._solve(change)
            if steps is not None:
                return steps
            if self._room(checkpoint):
                self._directions.append(_Direction(change, _direction(checkpoint, change)))
                return [0.0] * (len(self._directions) - 1) + [1.0]
        self._first, self._origin, self._state = now, checkpoint, None
        self._directions, self._checked = [], False
        return []

    def _same_leaves(self, now: Coefficients, checkpoint: Checkpoint) -> bool:
        """Whether the names are those of the first, and all that methods make is known."""
        assert self._first is not None and self._origin is not None
        made = {key for key in now if isinstance(key[1], Apply)}
        same = self._origin.tensors.keys() == checkpoint.tensors.keys()
        return same and made <= self._first.keys()

    def _room(self, checkpoint: Checkpoint) -> bool:
        size = sum(4 * spec.numel for spec in checkpoint.values())
        return (len(self._directions) + 1) * size <= self.most

    def _solve(self, change: Coefficients) -> list[float] | None:
        """The multiples of the known differences that make up ``change``; None if none do."""
        import numpy as np

        if not change:
            return [0.0] * len(self._directions)
        union = dict.fromkeys([*change, *(k for d in self._directions for k in d.change)])
        keys = {key: i for i, key in enumerate(union)}
        wanted = np.zeros(len(keys))
        for key, value in change.items():
            wanted[keys[key]] = value
        matrix = np.zeros((len(keys), len(self._directions)))
        for j, direction in enumerate(self._directions):
            for key, value in direction.change.items():
                matrix[keys[key], j] = value
        if not self._directions:
            return None
        steps = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
        rest = np.abs(matrix @ steps - wanted).max()
        return [float(s) for s in steps] if rest <= 1e-9 * np.abs(wanted).max() else None

    def _sum(self, steps: list[float]) -> dict[str, Tensor]:
        assert self._origin is not None
        if self._state is None:
            self.computed += 1
            self._state = dict(self.evaluate(self._origin))
        found = dict(self._state)
        owned: set[str] = set()
        for step, direction in zip(steps, self._directions, strict=False):
            if not step:
                continue
            if direction.tensors is None:
                self.computed += 1
                made = direction.checkpoint
                direction.tensors = self.evaluate(made) if made.tensors else {}
            for name, tensor in direction.tensors.items():
                if name not in owned:
                    found[name] = found[name].clone()
                    owned.add(name)
                found[name].add_(tensor.to(found[name].dtype), alpha=step)
        return found

    def _as_foretold(self, checkpoint: Checkpoint, found: Mapping[str, Tensor]) -> bool:
        """Whether the smallest tensor that a method scales is what it should be; looked at once."""
        self._checked = True
        scaled = [n for n, e in checkpoint.tensors.items() if _scales(e)]
        if not scaled:
            return True
        name = min(scaled, key=lambda n: checkpoint[n].numel)
        alone = replace(checkpoint, tensors={name: checkpoint.tensors[name]}, tied={})
        wanted = self.evaluate(alone)[name]
        assert self._state is not None
        moved = float((wanted - self._state[name]).abs().max())
        rounding = 1e-5 * float(wanted.abs().max())
        return float((wanted - found[name]).abs().max()) <= 1e-3 * moved + rounding


def _coefficients(checkpoint: Checkpoint) -> Coefficients:
    found: Coefficients = {}
    for name, expr in checkpoint.tensors.items():
        if name not in checkpoint.tied and expr.dtype.kind == "float":
            for coefficient, leaf in _terms(expr):
                key = (name, leaf)
                found[key] = found.get(key, 0.0) + coefficient
    return found


def _terms(expr: Expr, factor: float = 1.0) -> list[tuple[float, Expr]]:
    """The leaves of a tensor with their coefficients; a scaled result as two results."""
    if isinstance(expr, Linear):
        return [term for c, inner in expr.terms for term in _terms(inner, factor * c)]
    if isinstance(expr, Apply) and _scales(expr):
        scale = float(expr.arguments[_SCALE])  # type: ignore[arg-type]
        return [(factor * (1.0 - scale), _at(expr, 0.0)), (factor * scale, _at(expr, 1.0))]
    return [(factor, expr)]


def _scales(expr: Expr) -> bool:
    if isinstance(expr, Linear):
        return any(_scales(inner) for _, inner in expr.terms)
    return isinstance(expr, Apply) and isinstance(expr.arguments.get(_SCALE), float)


def _at(expr: Apply, scale: float) -> Apply:
    return replace(
        expr, parameters=tuple((k, scale if k == _SCALE else v) for k, v in expr.parameters)
    )


def _difference(now: Coefficients, first: Coefficients) -> Coefficients:
    keys = {**first, **now}
    found = {key: now.get(key, 0.0) - first.get(key, 0.0) for key in keys}
    return {key: value for key, value in found.items() if abs(value) > 1e-15}


def _direction(checkpoint: Checkpoint, change: Coefficients) -> Checkpoint:
    """The tensors that change, as differences."""
    terms: dict[str, list[tuple[float, Expr]]] = {}
    for (name, leaf), coefficient in change.items():
        terms.setdefault(name, []).append((coefficient, leaf))
    return replace(
        checkpoint,
        tensors={name: linear_sum(found) for name, found in terms.items()},
        mass=0.0,
        tied={},
    )
