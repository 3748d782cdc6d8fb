"""Layers as mixtures of shared templates, and new layers as new mixtures.

MixtureGrowth (Pham et al. 2024, arXiv:2311.04251): layer l is sum_i a[l, i] T_i over templates that
all layers share. A network grows by new rows of coefficients, orthogonal to those that there are,
so that new layers start from trained templates and yet from none of the old layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["factorised", "grown"]


def factorised(layers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Coefficients (L, count) and templates (count, numel) of layers (L, numel), in float64.

    Templates are orthonormal: the leading right singular vectors, so that no other ``count`` give
    the layers more nearly. From the Gram matrix (L, L): numel may be large.
    """
    import torch

    if not 1 <= count <= len(layers):
        raise PlanError(
            "there are not that many templates in these layers",
            found=count,
            expected=f"1 to {len(layers)}",
        )
    rows = layers.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    order = values.argsort(descending=True)[:count]
    scales = values[order].clamp(min=0.0).sqrt()
    inverse = torch.where(scales > scales.max() * 1e-12, 1.0 / scales, torch.zeros_like(scales))
    left = vectors[:, order]
    return left * scales, (left * inverse).T @ rows


def grown(coefficients: Tensor, count: int) -> Tensor:
    """``count`` new rows of coefficients, (count, k), of the old rows' mean length.

    They are the directions in which the old rows have least: orthogonal to all of them where there
    are any left, and to one another in any case. More rows than templates repeat with other signs.
    """
    import torch

    old = coefficients.double()
    values, vectors = torch.linalg.eigh(old.T @ old)
    least = vectors[:, values.argsort()].T
    length = old.norm(dim=1).mean()
    turns = [(-1.0) ** (n // len(least)) for n in range(count)]
    rows = torch.stack([t * least[n % len(least)] for n, t in enumerate(turns)])
    found: Tensor = rows * length
    return found
