"""Means and products of activations, gathered batch by batch, as if all were seen at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Moments"]


@dataclass(slots=True)
class Moments:
    """Of two sets of units, seen on the same samples: counts, means, variances, covariances.

    One pass, in float64, stable however far the means are from zero (Welford 1962; batches joined
    by Chan, Golub and LeVeque 1979). Holds n x m numbers for n and m units.
    """

    count: int = 0
    means: list[Any] = field(default_factory=list)
    squares: list[Any] = field(default_factory=list)  # of differences to the means
    products: Any = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add samples: a (samples, n) and b (samples, m)."""
        import torch

        new = [x.double() for x in (a, b)]
        size = len(a)
        if not size:
            return
        means = [x.mean(0) for x in new]
        centred = [x - m for x, m in zip(new, means, strict=True)]
        squares = [(x * x).sum(0) for x in centred]
        products = centred[0].T @ centred[1]
        if not self.count:
            self.count, self.means, self.squares = size, means, squares
            self.products = products
            return
        total = self.count + size
        steps = [m - old for m, old in zip(means, self.means, strict=True)]
        share = self.count * size / total
        self.products += products + share * torch.outer(*steps)
        for k, step in enumerate(steps):
            self.squares[k] += squares[k] + share * step * step
            self.means[k] = self.means[k] + step * (size / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Of each unit of the first set with each of the second, (n, m)."""
        result: Tensor = self.products / max(1, self.count)
        return result

    def correlation(self) -> Tensor:
        """The same of units scaled to variance 1; 0 for a unit that hardly ever changes."""
        import torch

        scales = []
        for square, mean in zip(self.squares, self.means, strict=True):
            deviation = (square / max(1, self.count)).sqrt()
            # what rounding leaves of a constant is no signal
            alive = (deviation > 1e-6 * mean.abs()) & (deviation > 1e-6 * deviation.mean())
            scales.append(torch.where(alive, 1.0 / deviation.clamp_min(1e-300), 0.0))
        return self.covariance() * scales[0][:, None] * scales[1]
