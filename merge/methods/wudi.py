"""WUDI: least interference with each task's own inputs (Cheng et al. 2025, arXiv:2503.08099).

    d_k = W_k - B;   out = B + lambda * t, where t minimises
    sum_k |(t - d_k) d_k^T|^2 / |d_k|^2        (Frobenius norms)

The rows of d_k span the inputs on which model k was trained, so this is the interference there.
The paper walks 300 steps of Adam from sum_k d_k; here the minimum is solved for. It is not unique
where the d_k leave inputs unused, and there the term + e |t - sum_k d_k|^2 picks the one nearest to
the paper's start::

    G_k = d_k^T d_k / |d_k|^2
    t (sum_k G_k + e I) = sum_k d_k G_k + e sum_k d_k,   e = ridge * mean eigenvalue of sum_k G_k

The paper leaves all but linear layers at the base. Here all that is not a matrix is B + lambda *
mean_k d_k, and so are matrices with a side over 8 times the other: vocabularies. A table of
positions is a matrix here.

Recipe::

    merge_method: wudi
    base_model: base
    models:
      - model: a
      - model: b
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.schema import Operands, Range, Tensor, method
from merge.methods.core.shapes import not_a_matrix
from merge.methods.core.spectral import added, gram, scaled_mean


def scratch(shape: tuple[int, ...], _count: int) -> int:
    """Elements of float32 that are held: two float64 matrices of the input side, three deltas."""
    out, inputs = shape
    return 2 * inputs * (2 * inputs + 3 * out)


@method(space="delta", local="tensor", idempotent=False, scratch=scratch)
def wudi(
    deltas: Operands,
    *,
    ridge: Annotated[float, Range(1e-10, 1.0)] = 1e-6,
    lambda_: float = 1.0,
) -> Tensor:
    """The base plus the difference that disturbs each model least on that model's own inputs.

    ridge: pull towards the sum of the differences, of the mean curvature, in [1e-10, 1]; float64
    solves the equations at the least of it. lambda: scales the result; the paper needs none.
    """
    import torch

    total = added(deltas)
    left, right = _equations(deltas)
    pull = ridge * float(left.diagonal().mean())
    if pull == 0.0:  # no model differs from the base
        return total
    left.diagonal().add_(pull)
    right.add_(total, alpha=pull)
    left = torch.linalg.cholesky(left)
    return torch.cholesky_solve(right.T, left).T.mul(lambda_).to(total.dtype)


def _equations(deltas: Operands) -> tuple[Tensor, Tensor]:
    """sum_k G_k and sum_k d_k G_k, in float64."""
    import torch

    inputs = deltas[0].shape[1]
    left = torch.zeros(inputs, inputs, dtype=torch.float64, device=deltas[0].device)
    right = torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta in deltas:
        own = gram(delta)
        energy = own.trace()
        if energy > 0.0:
            own /= energy
            left += own
            right.addmm_(delta.double(), own)
    return left, right


wudi.when(not_a_matrix)(scaled_mean)
