"""RAM: average what several models changed, keep what one changed (Yuan et al. 2026,
arXiv:2601.13572).

Reinforced Agent Merging, from Behavior Knowledge Merge in Reinforced Agentic Models.

    d_i = W_i - B
    z_i = d_i where |d_i| > epsilon, else 0
    c = number of models with z_i != 0, element by element
    out = B + sum_i z_i / max(c, 1)

Reinforcement learning changes few weights, and other ones in every run; a mean over all models
would shrink what only one of them has learnt. With dense differences, as supervised fine-tuning
makes them, nearly every element is shared and the result is close to the mean.

Recipe::

    merge_method: ram
    base_model: base
    models:
      - model: a
      - model: b
"""

from __future__ import annotations

from typing import Annotated

from merge.methods.core.schema import Operands, Range, Tensor, method


@method(space="delta", idempotent=False)
def ram(deltas: Operands, *, epsilon: Annotated[float, Range(low=0.0)] = 1e-5) -> Tensor:
    """The base plus the mean difference over those models that changed an element.

    epsilon: what counts as a change is larger than this, in units of the weights; at least 0.
    """
    changes, changed = changes_of(deltas, epsilon)
    total = changes[0].clone()
    for change in changes[1:]:
        total += change
    return total.div_(changed.clamp_(min=1.0))


def changes_of(deltas: Operands, epsilon: float) -> tuple[list[Tensor], Tensor]:
    """The deltas with all that is no change zeroed, and how many models changed each element."""
    import torch

    changes = [torch.nn.functional.hardshrink(d, epsilon) for d in deltas]
    changed, mask = torch.zeros_like(deltas[0]), torch.empty_like(deltas[0])
    for change in changes:
        changed += torch.ne(change, 0.0, out=mask)
    return changes, changed
