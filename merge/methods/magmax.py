"""MagMax: of all differences to a base, the largest (Marczak et al. 2024, arXiv:2407.06322).

    d_i = w_i (W_i - B)
    k = argmax_i |d_i|                element by element; the first model wins a tie
    out = B + lambda * d_k

The paper scales by 0.5 throughout, which is the default here, and tunes the models one after the
other, each from the one before; with models tuned apart it works as well. The weights are ours:
with the default of 1 they change nothing.

Recipe::

    merge_method: magmax
    base_model: base
    models:
      - model: a
      - model: b
    parameters: {lambda: 0.5}
"""

from __future__ import annotations

from merge.methods.core.schema import Operands, PerModel, Tensor, each, method


@method(space="delta", symmetric=False, idempotent=False)
def magmax(
    deltas: Operands, *, weight: PerModel[float] = each(1.0), lambda_: float = 0.5
) -> Tensor:
    """The base plus, at each element, the difference to it of largest magnitude.

    weight: one number a model, which its differences are multiplied by before they are compared.
    lambda: scales the sum; 1 gives the chosen differences whole.
    """
    import torch

    chosen = deltas[0] * weight[0]
    size, larger = chosen.abs(), torch.empty_like(chosen)
    for delta, w in zip(deltas[1:], weight[1:], strict=True):
        rival = delta * w
        torch.gt(rival.abs(), size, out=larger)
        chosen = torch.lerp(chosen, rival, larger)  # 0 or 1: one or the other, exactly
        size = torch.maximum(size, rival.abs())
    return chosen.mul_(lambda_)
