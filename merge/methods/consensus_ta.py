"""Consensus task arithmetic: keep what several tasks agree on (Wang et al. 2024, arXiv:2405.07813).

    d_i = W_i - B
    tau = sum_i w_i d_i
    m_i = [|d_i| > mask_lambda_i * |tau - d_i|]       the TALL mask of model i
    out = B + lambda * tau where sum_i m_i >= agree, else B

m_i marks the elements that matter to task i: there its difference outweighs what the other tasks
add to it. An element that matters to one task alone (selfish) or to none (catastrophic) is left as
it is in the base.

Recipe::

    merge_method: consensus_ta
    base_model: base
    models:
      - model: a
      - model: b
    parameters: {lambda: 0.5}
"""

from __future__ import annotations

from typing import Annotated

from merge.errors import RecipeError
from merge.methods.core.consensus import summed
from merge.methods.core.schema import Operands, PerModel, Range, Tensor, each, method


@method(space="delta", inputs=(2, None), idempotent=False)
def consensus_ta(
    deltas: Operands,
    *,
    weight: PerModel[float] = each(1.0),
    mask_lambda: Annotated[PerModel[float], Range(low=0.0)] = each(0.4),
    agree: Annotated[int, Range(low=0.0)] = 2,
    lambda_: float = 1.0,
) -> Tensor:
    """The base plus the sum of differences, where enough models have a stake in the element.

    weight: one number a model. mask_lambda: one number a model, at least 0, the larger the fewer
    elements its mask has; the paper chooses it from 0.2 to 0.6. agree: models whose masks must hold
    an element, from 0 (plain task arithmetic) to the number of models. lambda: scales the sum;
    usually 0.2 to 1, less for more models.
    """
    import torch

    if agree > len(deltas):
        raise RecipeError(
            "more models must agree than there are",
            key="agree",
            found=f"{agree}",
            expected=f"at most {len(deltas)}",
        )
    total = summed(deltas, weight, [1.0] * len(deltas), normalize=False, scale=1.0)
    stakes, mask = torch.zeros_like(total), torch.empty_like(total)
    for delta, bound in zip(deltas, mask_lambda, strict=True):
        stakes += torch.gt(delta.abs(), (total - delta).abs_().mul_(bound), out=mask)
    return total.mul_(torch.ge(stakes, agree, out=mask)).mul_(lambda_)
