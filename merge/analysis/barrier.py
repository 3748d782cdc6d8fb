"""The loss along the straight line between two networks: barriers, whole, by layer, and estimated.

The barrier (Frankle et al. 2020, arXiv:1912.05671) is how far the loss rises over the straight line
between its ends: ``max_t L((1-t) A + t B) - ((1-t) L(A) + t L(B))``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from merge.analysis.task import Batch, Measured, Task

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, Tensor]

__all__ = ["Curve", "Estimate", "LayerBarrier", "between", "curve", "estimate", "layer_barriers"]

POINTS = 25


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses along the line, ``t`` from 0 (the first network) to 1 (the second)."""

    t: tuple[float, ...]
    points: tuple[Measured, ...]

    @property
    def barrier(self) -> float:
        """The largest rise over the line between the ends."""
        first, last = self.points[0].loss, self.points[-1].loss
        pairs = zip(self.t, self.points, strict=True)
        return max(p.loss - ((1 - t) * first + t * last) for t, p in pairs)

    @property
    def middle(self) -> Measured:
        """Half way."""
        return self.points[len(self.points) // 2]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "barrier": self.barrier,
            "t": list(self.t),
            "loss": [p.loss for p in self.points],
            "right": [p.right for p in self.points],
        }


@dataclass(frozen=True, slots=True)
class LayerBarrier:
    """The rise at the mid-point when only one layer goes there, and when all up to it do."""

    layer: str
    alone: float
    up_to: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The rise at the mid-point as slope and curvature along the line foretell it.

    slope, curvature: first and second derivative of the loss by t, at both ends and half way. rise:
    by the ends. from_middle: by the mid-point's curvature, an eighth of it and downwards.
    """

    slope: tuple[float, float, float]  # at t = 0, 1 and 1/2
    curvature: tuple[float, float, float]
    rise: float
    from_middle: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def between(a: State, b: State, t: float, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The network at ``t`` of the line; only the tensors ``names`` leave the first network.

    At both ends it is the end to the bit, and between two equal networks the same one.
    """
    import torch

    chosen = set(a if names is None else names)
    return {
        n: torch.lerp(x, b[n], t) if n in chosen and x.is_floating_point() else x
        for n, x in a.items()
    }


def curve(
    task: Task,
    a: State,
    b: State,
    batches: Sequence[Batch],
    *,
    points: int = POINTS,
    names: Sequence[str] | None = None,
    repaired: Callable[[State, float], State] | None = None,
) -> Curve:
    """The loss at evenly spaced points of the line, both ends among them.

    repaired: what is done to a network between the ends before it is judged.
    """
    line = [i / (points - 1) for i in range(points)]
    found = []
    for t in line:
        state: State = between(a, b, t, names)
        if repaired is not None and 0 < t < 1:
            state = repaired(state, t)
        found.append(task.measure(state, batches))
    return Curve(tuple(line), tuple(found))


def layer_barriers(
    task: Task,
    a: State,
    b: State,
    batches: Sequence[Batch],
    layers: Mapping[str, Sequence[str]],
) -> list[LayerBarrier]:
    """Of each layer, how far the loss rises when it is the mean of both networks' and all else is
    the first network's; likewise of all layers up to it.

    Over the mean loss of the whole networks (Adilova et al. 2024, arXiv:2307.06966). layers: names
    of their tensors, in the network's order.
    """
    ends = [task.measure(s, batches).loss for s in (a, b)]

    def rise(names: Sequence[str]) -> float:
        return task.measure(between(a, b, 0.5, names), batches).loss - sum(ends) / 2

    out, before = [], list[str]()
    for layer, names in layers.items():
        before = [*before, *names]
        out.append(LayerBarrier(layer, rise(names), rise(before)))
    return out


def estimate(task: Task, a: State, b: State, batches: Sequence[Batch]) -> Estimate:
    """The rise at the mid-point by a parabola at either end, the mean of both, and by one there.

    With d = B - A the loss along the line begins as ``L(A) + t g'd + t^2 d'Hd / 2``, by one
    Hessian-vector product at each end; at t = 1/2 the curvature adds an eighth of d'Hd. About the
    mid-point M the ends lie an eighth of d'Hd over it, so the rise is ``-d'H(M)d / 8``.
    """
    weights = task.weights(batches)
    slopes, curvatures, losses = [], [], []
    for t in (0.0, 1.0, 0.5):
        sums = [0.0, 0.0, 0.0]
        for weight, batch in zip(weights, batches, strict=True):
            for k, value in enumerate(_derivatives(task, a, b, batch, t)):
                sums[k] += weight * value
        losses.append(sums[0])
        slopes.append(sums[1])
        curvatures.append(sums[2])
    first = losses[0] + slopes[0] / 2 + curvatures[0] / 8
    second = losses[1] - slopes[1] / 2 + curvatures[1] / 8
    rise = (first + second) / 2 - sum(losses[:2]) / 2
    one, two = (slopes[0], slopes[1], slopes[2]), (curvatures[0], curvatures[1], curvatures[2])
    return Estimate(one, two, rise, -curvatures[2] / 8)


def _derivatives(task: Task, a: State, b: State, batch: Batch, at: float) -> list[float]:
    """The loss, its slope and its curvature along the line."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    t = torch.tensor(at, dtype=torch.float32, requires_grad=True)
    state = between(a, b, at)  # running statistics stay as they are here: they have no derivative
    weights = dict(task.module.named_parameters(remove_duplicate=False))
    floats = [n for n, x in a.items() if n in weights and x.is_floating_point()]
    state.update({n: a[n] + t * (b[n] - a[n]) for n in floats})
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has a first derivative only
        loss = task.loss(state, batch)
        (slope,) = torch.autograd.grad(loss, t, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, t)
    return [float(loss.detach()), float(slope.detach()), float(curvature)]
