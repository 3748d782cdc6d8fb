"""KnOTS: merge by TIES in a basis common to all models (Stoica et al. 2024, arXiv:2410.19735).

    d_k = W_k - B
    [d_1 ... d_K] = U S [V_1 ... V_K]^T        the differences side by side
    c_k = S V_k^T = U^T d_k, trimmed to its int(density_k * N) largest magnitudes
    v_k = w_k c_k
    s = +1 where sum_k v_k >= 0, else -1;   m_k = [sign(v_k) = s]
    out = B + lambda * U sum_k v_k m_k       divided elementwise by sum_k w_k m_k if normalize

Directions below 1e-5 of the largest singular value are left out. The paper trims over all layers
at once, here each matrix is trimmed by itself. A plain weighted sum in place of TIES is the same in
any basis (U U^T changes nothing), so inner: linear computes B + lambda * sum_k w_k d_k, divided by
sum_k w_k if normalize. So is all that is not a matrix, and matrices with a side over 8 times the
other: vocabularies.

Recipe::

    merge_method: knots
    base_model: base
    models:
      - model: a
        parameters: {weight: 1.0, density: 0.2}
      - model: b
        parameters: {weight: 1.0, density: 0.2}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from merge.errors import RecipeError
from merge.methods.core.consensus import elected
from merge.methods.core.schema import Coefficients, Operands, PerModel, Range, Tensor, each, method
from merge.methods.core.shapes import not_a_matrix
from merge.methods.core.spectral import scratch as of_svd
from merge.methods.core.spectral import thin_svd
from merge.methods.core.trim import kept_count


def scratch(shape: tuple[int, ...], count: int) -> int:
    """Elements of float32 that are held: those of the SVD, and coordinates before and after."""
    out, inputs = shape
    return of_svd((out, count * inputs), count) + count * out * inputs


@method(space="delta", local="tensor", idempotent=False, scratch=scratch)
def knots(
    deltas: Operands,
    *,
    weight: PerModel[float] = each(1.0),
    density: Annotated[PerModel[float], Range(0.0, 1.0)] = each(1.0),
    inner: str = "ties",
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """The base plus the differences to it, merged by TIES along common singular directions.

    weight: one number a model. density: kept fraction of each model's coordinates, in [0, 1]; the
    paper keeps 0.2. inner: ties or linear. normalize: average instead of sum. lambda: scales the
    result.
    """
    import torch

    basis, _, _ = thin_svd(torch.cat(list(deltas), dim=1))
    coordinates = [_largest(basis.T @ d, p) for d, p in zip(deltas, density, strict=True)]
    merged = elected(coordinates, weight, [1.0] * len(deltas), normalize=normalize)
    return (basis @ merged).mul_(lambda_)


def _largest(x: Tensor, density: float) -> Tensor:
    """``x`` with all but its largest magnitudes zeroed; those equal to the least kept stay."""
    kept = kept_count(density, x.numel())
    if kept >= x.numel():
        return x
    size = x.abs()
    least = size.flatten().kthvalue(x.numel() - kept + 1).values if kept else float("inf")
    return x.mul_(size >= least)


def _is_linear(
    shape: tuple[int, ...], parameters: Mapping[str, Any], vocabulary: bool | None
) -> bool:
    if parameters["inner"] not in ("ties", "linear"):
        raise RecipeError(
            "'inner' names no way to merge",
            key="inner",
            found=repr(parameters["inner"]),
            expected="ties or linear",
        )
    return parameters["inner"] == "linear" or not_a_matrix(shape, parameters, vocabulary)


@knots.when(_is_linear)
def _linear(*, weight: PerModel[float], normalize: bool, lambda_: float) -> Coefficients:
    total = sum(weight)
    divisor = total if normalize and abs(total) >= 1e-8 else 1.0
    return [lambda_ * w / divisor for w in weight]
