"""Singular values and directions of a matrix, through the float64 Gram matrix of its short side.

A A^T = U diag(s^2) U^T for a wide A, and V = A^T U diag(1/s). For a matrix four times as wide as
high this takes a third of the time of an SVD in float32 and a seventh of one in float64; for a
square one about as long as in float32. Squaring is paid for in float64: s_i and the i-th direction
are accurate to about 2^-52 (s_1 / s_i)^2 before they are rounded to the type of the matrix. At
`NULL` s_1 that is 2e-6, and what lies below is taken for the rounding noise of float32 and left
out, where an SVD would return arbitrary directions.

A randomised SVD is faster where few directions are wanted, but finds them only where the spectrum
falls quickly, which that of task vectors does not, and most methods want all of them.

Float64 copies are made of a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge.methods.core.schema import Coefficients, Operands, Tensor

__all__ = ["NULL", "added", "gram", "polar", "scaled_mean", "scratch", "thin_svd", "times"]

NULL = 1e-5
"""Singular values below this part of the largest belong to no direction of the matrix."""

_BLOCK = 1 << 19  # elements that are held in float64 at a time


def scratch(shape: Sequence[int], _count: int) -> int:
    """Elements of float32 that `thin_svd` and `polar` need.

    Five float64 matrices of the short side: Gram matrix, eigenvectors, the solver's two, a product.
    """
    return 2 * 5 * min(shape) ** 2


def scaled_mean(*, count: int, lambda_: float) -> Coefficients:
    """lambda times the mean: what spectral methods make of all that is not a matrix."""
    return [lambda_ / count] * count


def added(deltas: Operands) -> Tensor:
    """The sum of the deltas, in their order."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total


def gram(a: Tensor) -> Tensor:
    """A^T A in float64, (n, n) for an (m, n) matrix."""
    import torch

    out = torch.zeros(a.shape[1], a.shape[1], dtype=torch.float64, device=a.device)
    for _, block in _row_blocks(a):
        out.addmm_(block.T, block)
    return out


def times(a: Tensor, b: Tensor) -> Tensor:
    """A B, multiplied in the float64 of ``b`` and rounded once, to the type of ``a``."""
    out = a.new_empty(a.shape[0], b.shape[1])
    for rows, block in _row_blocks(a):
        out[rows] = block @ b
    return out


def thin_svd(
    a: Tensor, rank: int | None = None, null: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), s (k,) falling, V (n, k) with A = U diag(s) V^T but for what is left out.

    rank: at most so many directions, the leading ones. null: what is left out besides, singular
    values up to this one: for a matrix that is what remains of a larger one.
    """
    if a.shape[0] > a.shape[1]:
        v, s, u = thin_svd(a.T, rank, null)
        return u, s, v
    squares, u = _eigen(gram(a.T), null)
    s, u = squares[:rank].sqrt(), u[:, :rank]
    return u.to(a.dtype), s.to(a.dtype), times(a.T, u / s)


def polar(a: Tensor) -> Tensor:
    """The polar factor U V^T of A = U diag(s) V^T: the nearest matrix with orthonormal columns.

    For a tall (m, n) matrix; where A has null directions, so has the factor.
    """
    squares, v = _eigen(gram(a))
    return times(a, (v * squares.rsqrt()) @ v.T)


def _eigen(symmetric: Tensor, null: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors, of those that are not null."""
    import torch

    values, vectors = torch.linalg.eigh(symmetric)  # rising
    values, vectors = values.flip(0), vectors.flip(1)
    largest = float(values[0]) if len(values) else 0.0
    least = max(NULL**2 * largest, null**2)
    kept = int((values > least).sum())
    return values[:kept], vectors[:, :kept]


def _row_blocks(a: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _BLOCK // max(1, a.shape[1]))
    for at in range(0, a.shape[0], step):
        yield slice(at, at + step), a[at : at + step].double()
