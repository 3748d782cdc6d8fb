"""Gradients of coefficients from gradients of weights, for loops that train the weights' merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from merge.training.deltas import Delta

__all__ = ["coefficient_gradients"]


def coefficient_gradients(
    gradients: Any,
    deltas: Mapping[str, Delta] | Sequence[Delta],
    *,
    granularity: str = "layer",
    groups: Sequence[tuple[str, str]] = (),
    seed: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """The gradient of the loss by each coefficient: block to expert to numbers, in float64.

    For weights ``base + sum_k c_k delta_k`` it is <dL/dtheta, delta_k>, summed over the tensors of
    a block, so that autograd never sees the merge. gradients: of the weights by name, or a module
    whose parameters have them. Tensors without a gradient count nothing. deltas, granularity,
    groups: as of `MergedModule`; numbers are (1,), or one for each row, part or direction.

    Example::

        loss.backward()                         # an ordinary model, whose weights are the merge
        found = merge.coefficient_gradients(model, {"a": delta_a, "b": delta_b})
        found["encoder.layer.3"]["a"]
    """
    from merge.learning.layout import Link, layout_of
    from merge.training.deltas import directions_of, layer_of, numbered, parts_of

    own: dict[str, Tensor] = (
        dict(gradients)
        if isinstance(gradients, Mapping)
        else {n: p.grad for n, p in gradients.named_parameters() if p.grad is not None}
    )
    experts = deltas if isinstance(deltas, Mapping) else numbered(deltas)
    parts = parts_of(own, experts, seed)
    shapes = {n: tuple(own[n].shape) for n in parts}
    layout = layout_of(
        tuple(experts),
        shapes,
        granularity,
        Link(),
        layer_of=layer_of,
        groups=groups,
        directions=directions_of(parts),
    )
    out: dict[str, dict[str, Tensor]] = {}
    for name, of_tensor in parts.items():
        block = out.setdefault(layout.blocks[name], {})
        gradient = own[name].detach().contiguous()
        for expert, part in zip(experts, of_tensor, strict=True):
            found = part.pull_back(gradient, layout.kinds[name], layout.width(name)).cpu()
            block[expert] = block[expert] + found if expert in block else found
    return out
