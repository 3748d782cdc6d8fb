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

from dataclasses import dataclass

from merge.methods.core.measure import BLOCK, Derived, Tiles
from merge.methods.core.schema import Operands, Tensor, method
from merge.methods.core.trim import largest

_SMOOTHING = 1e-8


@dataclass(frozen=True, slots=True)
class Fusion:
    """From which importance on the other model's weights are taken; the divergence of each row."""

    threshold: float
    divergence: Tensor


def fusion(tiles: Tiles, **_: object) -> Fusion:
    """The divergences, in a walk of their own since they cost the most, then the quartiles."""
    import torch

    divergence = torch.empty(0)
    for start, models in tiles():
        if start == 0:  # made at once: small tensors between the tiles would hold their memory
            rows = tiles.numel // models[0].shape[-1]
            divergence = models[0].new_empty(rows, 1)
        divergence[start // models[0].shape[-1] :][: len(models[0])] = divergences(models)
    found = Derived(tiles, lambda start, models: [importance(start, models, divergence)])
    n = tiles.numel
    q1, q2, q3 = ascending(found, [k * (n - 1) // 4 for k in (1, 2, 3)])
    return Fusion(q2 + 1.5 * (q3 - q1), divergence)


def divergences(models: Operands) -> Tensor:
    """The Kullback-Leibler divergence of each row, as a column.

    That of fine-tunes is a small rest of large terms: float64 keeps it.
    """
    import torch

    q, p = (torch.softmax(x, -1, dtype=torch.float64).add_(_SMOOTHING) for x in models)
    found = (p / q).log_().mul_(p).sum(-1, keepdim=True)
    return found.clamp_(min=0.0).to(models[0].dtype)  # below it can be only by rounding


def importance(start: int, models: Operands, divergence: Tensor) -> Tensor:
    """|W - B| times the divergence of its row."""
    base, tuned = models
    first = start // base.shape[-1]
    return (tuned - base).abs_().mul_(divergence[first : first + len(base)])


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
    measure=fusion,
    walks=2,
    symmetric=False,
)
def arcee_fusion(models: Operands, *, measured: Fusion, start: int) -> Tensor:
    """The base, with those weights of the other model that differ the most."""
    import torch

    base, tuned = models
    size = importance(start, models, measured.divergence)
    taken = torch.ge(size, measured.threshold, out=torch.empty_like(size))
    return torch.lerp(base, tuned, taken)  # 0 or 1: one or the other, exactly
