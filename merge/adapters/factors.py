"""Thin factors of a matrix: of a sum of products exactly, of any other by the SVD.

A sum of products of thin matrices, sum_i w_i B_i A_i, has its singular value decomposition in the
joint basis of its factors: the QR decompositions of [w_1 B_1 ... w_K B_K] = Q R and of
[A_1; ...; A_K]^T = P S, and the SVD of the small core R S^T. It costs O((m + n) r^2) for the sum r
of the ranks, and the matrix itself is never formed.

A dense matrix gets its leading singular vectors by the randomised range finder with power
iterations (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4), or from the
eigenvectors of its Gram matrix, in float64, where nearly all are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Spectrum", "difference", "of_matrix", "of_products", "rank_for"]

Enough = Callable[["Tensor", float], bool]
"""Whether these squared singular values, of a matrix with that sum of squares, are enough."""

_OVERSAMPLING = 16  # directions beyond those wanted, and half as many as these again
_POWERS = 2
_FIRST = 32
_EXACT = 256
"""Matrices whose shorter side is at most this long are decomposed exactly."""

_BLOCK = 1 << 22  # elements that are widened to float64 at a time


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The leading singular triples of an (m, n) matrix D: D = left diag(values) right + the rest.

    left: (m, k), orthonormal columns. values: (k,), float64, falling. right: (k, n). total: the sum
    of squares of all of D.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    total: float

    @property
    def squares(self) -> Tensor:
        """The squared singular values."""
        return self.values.square()

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (m, rank) and A (rank, n), the root of the singular values in each, float32.

        Their product is the best approximation of D of that rank (Eckart and Young 1936).
        """
        root = self.values[:rank].sqrt()
        left = (self.left[:, :rank] * root).float()
        return left, (root[:, None] * self.right[:rank]).float()


def of_products(terms: Sequence[tuple[float, Tensor, Tensor]]) -> Spectrum:
    """The decomposition of sum_i w_i B_i A_i, for terms (w_i, B_i (m, r_i), A_i (r_i, n)).

    Computed in float64; all singular values that are not rounding errors are there.
    """
    import torch

    left = torch.cat([w * b.double() for w, b, _ in terms], dim=1)
    right = torch.cat([a.double() for _, _, a in terms], dim=0)
    q, r = torch.linalg.qr(left)
    p, s = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
    scale = float(torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right))
    kept = int((values > scale * 1e-14 * max(1, left.shape[1])).sum())
    values = values[:kept]
    return Spectrum(q @ u[:, :kept], values, v[:kept] @ p.T, float(values.square().sum()))


def of_matrix(matrix: Tensor, *, most: int, seed: int, enough: Enough | None = None) -> Spectrum:
    """The leading singular triples of a float32 matrix, ``most`` of them, or fewer if enough.

    enough: asked for growing numbers of them. seed: of the random directions.
    """
    import torch

    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64) ** 2)
    shortest = min(matrix.shape)
    if total == 0.0 or shortest == 0:
        empty = matrix.new_zeros(0)
        return Spectrum(matrix[:, :0], empty.double(), matrix[:0], 0.0)
    count = most if enough is None else min(most, _FIRST)
    while shortest > _EXACT and 3 * _width(count) < shortest:
        found = _leading(matrix, count, total, seed)
        if count >= most or enough is None or enough(found.squares, total):
            return found
        count = min(most, 2 * count)
    return _exact(matrix, total, most)


def _width(count: int) -> int:
    """Random directions for so many triples."""
    return count + count // 2 + _OVERSAMPLING


def _leading(matrix: Tensor, count: int, total: float, seed: int) -> Spectrum:
    """The first ``count`` triples, by random directions and power iterations."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(matrix.shape[1], _width(count), generator=generator).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ drawn)
    for _ in range(_POWERS):
        turned, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ turned)
    small = basis.T @ matrix
    u, values = _of_gram(_gram(small))
    u, values = u[:, :count], values[:count]
    right = (u.T.to(small) @ small) / values[:, None].to(small).clamp_min(1e-30)
    return Spectrum(basis @ u.to(basis), values, right, total)


def _exact(matrix: Tensor, total: float, most: int) -> Spectrum:
    """All triples, or the first ``most``, by the eigenvectors of the Gram matrix."""
    import torch

    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    u, values = _of_gram(_gram(wide))
    kept = min(most, int((values > values[:1] * 1e-9).sum())) if values.numel() else 0
    u, values = u[:, :kept], values[:kept]
    right = torch.empty(kept, wide.shape[1], dtype=torch.float32)
    step = max(1, _BLOCK // wide.shape[0])
    for at in range(0, wide.shape[1], step):
        block = wide[:, at : at + step].double()
        right[:, at : at + step] = ((u.T @ block) / values[:, None]).float()
    if tall:
        return Spectrum(right.T, values, u.T.float(), total)
    return Spectrum(u.float(), values, right, total)


def _gram(matrix: Tensor) -> Tensor:
    """M M^T in float64, some columns at a time."""
    import torch

    rows = matrix.shape[0]
    out = torch.zeros(rows, rows, dtype=torch.float64)
    step = max(1, _BLOCK // rows)
    for at in range(0, matrix.shape[1], step):
        block = matrix[:, at : at + step].double()
        out.addmm_(block, block.T)
    return out


def _of_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors in columns and the roots of eigenvalues, falling."""
    import torch

    squares, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), squares.flip(0).clamp_min(0).sqrt()


def rank_for(squares: Tensor, share: float, total: float) -> int:
    """The least number of leading values that hold the share of the sum of squares; all, if none.

    >>> import torch
    >>> rank_for(torch.tensor([9.0, 4.0, 1.0]), 0.9, 14.0)
    2
    """
    import torch

    reached = torch.cumsum(squares.double(), 0) >= share * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(squares)


def difference(terms: Sequence[tuple[float, Tensor, Tensor]]) -> float:
    """The Frobenius norm of sum_i w_i B_i A_i, without forming it."""
    import torch

    left = torch.cat([w * b.double() for w, b, _ in terms], dim=1)
    right = torch.cat([a.double() for _, _, a in terms], dim=0)
    _, r = torch.linalg.qr(left)
    _, s = torch.linalg.qr(right.T)
    return float(torch.linalg.matrix_norm(r @ s.T))
