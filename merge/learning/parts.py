"""What a coefficient scales: the difference of an expert, dense or in singular directions.

For the gradient G of the loss by a tensor, a coefficient's gradient is an inner product::

    whole       <G, D>                             theta += c D
    row         sum over row i of G * D            theta_i += c_i D_i
    partition   sum over elements of part p        element e gets c_part(e)
    singular    s_i u_i^T G v_i                    theta += U diag(c s) V^T

Directions and rows together (``singular+row``) have numbers g for directions and a for rows: the
entry (i, j) of U counts ``g_j + a_i / 5``, and gradients follow as above. The fifth lets one rate
serve both: a row's number moves all directions at once.

Sums are taken in the tensors' type over pieces of 2^18 elements and added up in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.learning.coefficients import Kind
from merge.methods.core.masks import Stream

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dense", "Factored", "Part", "Quantised", "dot", "part_ids", "quantised"]

_PIECE = 1 << 18
_IDS = 1 << 20  # elements whose part numbers are in memory at a time
_CODES = 256  # neighbours that share a scale
_ROWS = 0.2  # what a row's number counts beside a direction's


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A difference as it is. tensor: its name, by which hashed parts are drawn.

    start: the index in the tensor of the first element, where this is a run of it.
    """

    value: Tensor
    tensor: str = ""
    seed: int = 0
    start: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.value.nbytes)

    def pull_back(self, gradient: Tensor, kind: Kind, width: int) -> Tensor:
        """The gradient of this part's coefficients, (width,) in float64."""
        if kind == "row":
            product = gradient * self.value
            return product.reshape(width, -1).sum(1).double().cpu()
        if kind == "partition":
            return self._by_parts(gradient, width)
        return dot(gradient, self.value).reshape(1)

    def add_to(self, theta: Tensor, step: Tensor, kind: Kind) -> None:
        """theta += coefficient times this, in place."""
        if kind == "row":
            shape = (-1, *[1] * (theta.dim() - 1))
            theta.addcmul_(step.to(theta).reshape(shape), self.value)
        elif kind == "partition":
            flat, value = theta.view(-1), self.value.reshape(-1)
            numbers = step.to(theta)
            for at, ids in part_ids(self.tensor, self.seed, flat, len(step), self.start):
                end = at + len(ids)
                flat[at:end].addcmul_(numbers[ids], value[at:end])
        else:
            theta.add_(self.value, alpha=float(step))

    def _by_parts(self, gradient: Tensor, width: int) -> Tensor:
        import torch

        out = torch.zeros(width, dtype=torch.float64)
        flat, value = gradient.reshape(-1), self.value.reshape(-1)
        for at, ids in part_ids(self.tensor, self.seed, flat, width, self.start):
            end = at + len(ids)
            product = (flat[at:end] * value[at:end]).double()
            out += torch.bincount(ids, weights=product, minlength=width).cpu()
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """U diag(s) V^T: left (m, r), s (r,), right (n, r). tensor, seed: as in `Dense`."""

    left: Tensor
    s: Tensor
    right: Tensor
    tensor: str = ""
    seed: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.left.nbytes + self.s.nbytes + self.right.nbytes)

    def pull_back(self, gradient: Tensor, kind: Kind, width: int) -> Tensor:
        """As `Dense.pull_back`; two thin products, and the matrix itself is not made.

        It is for hashed parts, which no product keeps apart.
        """
        import torch

        if kind == "partition":
            return self._dense(gradient).pull_back(gradient, kind, width)
        matrix = gradient.reshape(self.left.shape[0], -1)
        projected = matrix @ self.right  # (m, r)
        if kind == "row":
            return ((projected * self.s) * self.left).sum(1).double().cpu()
        each = (projected * self.left).sum(0).double() * self.s.double()
        if kind in ("singular", "singular+row"):
            out = torch.zeros(width, dtype=torch.float64)
            out[: len(each)] = each.cpu()
            if kind == "singular+row":
                rows = ((projected * self.s) * self.left).sum(1).double().cpu()
                out[width - len(rows) :] = _ROWS * rows
            return out
        return each.sum().reshape(1).cpu()

    def add_to(self, theta: Tensor, step: Tensor, kind: Kind) -> None:
        """As `Dense.add_to`."""
        if kind == "partition":
            self._dense(theta).add_to(theta, step, kind)
            return
        matrix = theta.view(self.left.shape[0], -1)
        if kind == "row":
            scaled = self.left * step.to(theta)[:, None]
            matrix.addmm_(scaled * self.s, self.right.T)
            return
        if kind == "singular+row":
            rows = step[len(step) - len(self.left) :]
            each = step[: len(self.s)] + _ROWS * rows[:, None]  # (m, r), in float64
            matrix.addmm_(self.left * (self.s * each.to(self.s)), self.right.T)
            return
        numbers = step[: len(self.s)] if kind == "singular" else step
        matrix.addmm_(self.left * (self.s * numbers.to(self.s)), self.right.T)

    def _dense(self, like: Tensor) -> Dense:
        return Dense(((self.left * self.s) @ self.right.T).view_as(like), self.tensor, self.seed)


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A dense difference in bytes, with a scale for every 256 neighbours."""

    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    tensor: str
    seed: int

    @property
    def nbytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes)

    def dense(self) -> Dense:
        """The difference again, within half a step of each scale."""
        import math

        value = self.codes.to(self.scales.dtype).mul_(self.scales[:, None])
        return Dense(
            value.view(-1)[: math.prod(self.shape)].view(self.shape), self.tensor, self.seed
        )

    def pull_back(self, gradient: Tensor, kind: Kind, width: int) -> Tensor:
        """As `Dense.pull_back`."""
        return self.dense().pull_back(gradient, kind, width)

    def add_to(self, theta: Tensor, step: Tensor, kind: Kind) -> None:
        """As `Dense.add_to`."""
        self.dense().add_to(theta, step, kind)


Part = Dense | Factored | Quantised


def quantised(part: Dense) -> Quantised:
    """The part in bytes: round(127 x / largest of 256 neighbours)."""
    import torch

    flat = part.value.reshape(-1)
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % _CODES)).view(-1, _CODES)
    scales = rows.abs().amax(1) / 127
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (rows / safe[:, None]).round_().to(torch.int8)
    return Quantised(codes, scales, tuple(part.value.shape), part.tensor, part.seed)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product, in float64 over pieces that do not depend on threads."""
    import torch

    a, b = a.reshape(-1), b.reshape(-1)
    if not len(a):
        return torch.zeros((), dtype=torch.float64)
    pieces = zip(torch.split(a, _PIECE), torch.split(b, _PIECE), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in pieces]).double().sum().cpu()


def part_ids(
    tensor: str, seed: int, like: Tensor, count: int, start: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """The part of each element, a run at a time: (index of the first, part numbers).

    ``like`` holds the tensor's elements from ``start`` on.

    A hash of the element's index, so that nothing is stored and the same parts come out everywhere.
    """
    stream = Stream(seed, "partition", tensor)
    flat = like.view(-1)
    for at in range(0, len(flat), _IDS):
        yield at, stream.pick(0, start + at, flat[at : at + _IDS], count)
