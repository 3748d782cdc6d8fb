"""RAM+, tensor by tensor: make up for what averaging takes from a model (Yuan et al. 2026,
arXiv:2601.13572).

From Behavior Knowledge Merge in Reinforced Agentic Models.

    d_i = W_i - B
    z_i = d_i where |d_i| > epsilon, else 0
    c = number of models with z_i != 0, element by element
    rho_i = (elements with z_i != 0 and c > 1) / (elements with z_i != 0 and c = 1)
    s_i = 1 + r * min(rho_i, alpha)
    out = B + sum_i z_i / c where c > 1, s_i z_i of the one model where c = 1, B where c = 0

The more of a model's changes are shared, and so averaged, the more its own are raised, up to the
factor 1 + r alpha. The paper counts rho over the whole model; counts are per tensor here and in
mergekit, which calls that tensor-local.

Recipe::

    merge_method: ramplus_tl
    base_model: base
    models:
      - model: a
      - model: b
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.measure import Tiles, blocks
from merge.methods.core.schema import Operands, Range, Tensor, method
from merge.methods.ram import changes_of


def overlaps(tiles: Tiles, *, epsilon: float, **_: object) -> list[float]:
    """rho of each model: its shared changes over its own; 0 where it has none of its own."""
    import torch

    shared, own = [0] * tiles.count, [0] * tiles.count
    for _start, deltas in tiles():
        changes, changed = changes_of(deltas, epsilon)
        mask = torch.empty_like(changed)
        alone = torch.eq(changed, 1.0, out=torch.empty_like(changed))
        for i, change in enumerate(changes):
            torch.ne(change, 0.0, out=mask)
            for one, other in zip(blocks(mask), blocks(alone), strict=True):
                count = int(one.dot(other))  # whole numbers below 2^24: exact
                own[i] += count
                shared[i] += int(one.sum()) - count
    return [s / o if o else 0.0 for s, o in zip(shared, own, strict=True)]


@method(space="delta", measure=overlaps, idempotent=False)
def ramplus_tl(
    deltas: Operands,
    *,
    epsilon: Annotated[float, Range(low=0.0)] = 1e-5,
    r: float = 0.1,
    alpha: Annotated[float, Range(low=0.0)] = 0.2,
    measured: list[float],
) -> Tensor:
    """The base plus shared changes averaged, and each model's own raised by how much it shares.

    epsilon: what counts as a change is larger than this, in units of the weights; at least 0.
    r: gain for each unit of rho; 0 gives `ram`. alpha: the most of rho that counts, at least 0.
    """
    import torch

    changes, changed = changes_of(deltas, epsilon)
    own = torch.eq(changed, 1.0, out=torch.empty_like(changed))
    total = torch.zeros_like(changed)
    for change, rho in zip(changes, measured, strict=True):
        total.add_(change).addcmul_(change, own, value=r * min(rho, alpha))
    return total.div_(changed.clamp_(min=1.0))
