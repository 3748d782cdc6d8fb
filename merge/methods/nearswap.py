"""NearSwap: take the other model's value where it is near (Alchemonaut 2024, QuartetAnemoi-70B).

Known from mergekit (Goddard et al. 2024, arXiv:2403.13257), which computes, element by element,

    a = min(t / |W - B|, 1)
    out = (1 - a) B + a W

This is W where it lies within t of B, and else B moved towards W by t: W clamped to
[B - t, B + t], which is how it is computed here, without a division and exactly W or B where it
should be. mergekit's guard against a division by 0, max(|W - B|, 1e-6), shows only for t below
1e-6, where it takes less than W of elements that are nearer than that.

Recipe::

    merge_method: nearswap
    base_model: a
    models:
      - model: a
      - model: b
    parameters: {t: 0.0001}
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.schema import Operands, Range, Tensor, method


@method(space="weight", inputs=(2, 2), base="first operand", symmetric=False)
def nearswap(models: Operands, *, t: Annotated[float, Range(low=0.0)]) -> Tensor:
    """The base with every element moved towards the other model by at most ``t``.

    t: in units of the weights, at least 0, which gives the base. The published merges use 0.0001
    and warn of more than 0.0025.
    """
    import torch

    base, other = models
    return torch.clamp(other, min=base - t, max=base + t)
