"""Arcee Fusion: take over only what changed most (mergekit, Goddard et al. 2024, arXiv:2403.13257).

    p, q = softmax of a row of W, of B, each + 1e-8
    I = |W - B| * sum p log(p / q)                  the sum over the row
    threshold = Q2 + 1.5 (Q3 - Q1)                  Qk = sorted I [floor(k (N - 1) / 4)]
    out = W where I >= threshold, else B

A vector is one row, a convolution's kernel has one for each output channel.

mergekit estimates the quartiles of a tensor of more than a million elements from a random sample;
here they are exact, and nothing is random. It writes float32 whatever the models are; here the type
of the models stays. It sums the divergence in float32, whose rounding is a fiftieth of what the
divergence of a fine-tune is, and so takes over some other weights near the threshold.

Recipe::

    merge_method: arcee_fusion
    base_model: a
    models:
      - model: b
"""

from __future__ import annotations

from merge.methods.core.measure import BLOCK, Derived, Tiles
from merge.methods.core.schema import Operands, Tensor, method
from merge.methods.core.trim import largest

_SMOOTHING = 1e-8


def importance(models: Operands) -> list[Tensor]:
    """|W - B| times the Kullback-Leibler divergence of its row, as one operand.

    The divergence of fine-tunes is a small rest of large terms: float64 keeps it.
    """
    import torch

    base, tuned = models
    q, p = (torch.softmax(x, -1, dtype=torch.float64).add_(_SMOOTHING) for x in models)
    divergence = (p / q).log_().mul_(p).sum(-1, keepdim=True)
    divergence.clamp_(min=0.0)  # which it can be below only by rounding
    return [(tuned - base).abs_().mul_(divergence.to(base.dtype))]


def threshold(tiles: Tiles, **_: object) -> float:
    """From where on an importance stands out from those of the whole tensor."""
    n = tiles.numel
    q1, q2, q3 = ascending(Derived(tiles, importance), [k * (n - 1) // 4 for k in (1, 2, 3)])
    return q2 + 1.5 * (q3 - q1)


def ascending(tiles: Tiles, places: list[int]) -> list[float]:
    """The values at these places, from 0, of the sorted magnitudes of the first operand."""
    import torch

    if tiles.numel <= BLOCK:  # few enough to sort
        values = torch.cat([x.reshape(-1) for _, [x] in tiles()]).sort().values
        return [float(values[at]) for at in places]
    return [cut.threshold for cut in largest(tiles, [(0, tiles.numel - at) for at in places])]


@method(
    space="weight",
    inputs=(2, 2),
    base="first operand",
    local="row",
    measure=threshold,
    symmetric=False,
)
def arcee_fusion(models: Operands, *, measured: float) -> Tensor:
    """The base, with those weights of the other model that differ the most."""
    import torch

    base, tuned = models
    [found] = importance(models)
    return torch.where(found >= measured, tuned, base)
