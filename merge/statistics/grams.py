"""Gram matrices C = X^T X / n of the inputs X of linear layers, gathered while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from merge.statistics.layers import Layer, masks_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["gathered_grams", "watched"]

_ROWS = 1 << 14
"""Rows that are multiplied at a time: their products are added up in float64."""


def gathered_grams(
    module: nn.Module,
    layers: Sequence[Layer],
    run: Callable[[Any], object],
    batches: Sequence[Any],
) -> dict[str, Tensor]:
    """The Gram matrix of each weight's inputs over all batches, in float64.

    run: the network on a batch, with whatever weights; it may stop early by raising what it catches
    itself. A weight that is used several times has one matrix over all its inputs; one that never
    is has zeros.
    """
    import torch

    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {layer.weight: 0 for layer in layers}
    masks: list[Tensor] = []

    def see(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = layer.rows(args, kwargs, masks).detach()
        if rows.ndim == 2 and len(layer.gram) == 3 and layer.gram[-1] != 1:
            rows = rows[None]
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        if layer.weight not in totals:
            totals[layer.weight] = _zeros(layer, rows.device)
        total = totals[layer.weight]
        counts[layer.weight] += rows.shape[-2]
        for block in torch.split(rows, _ROWS, dim=-2):
            total += (block.mT @ block).double().reshape(total.shape)

    with watched(module, layers, see), torch.no_grad():
        for inputs in batches:
            masks[:] = masks_of(inputs)
            run(inputs)
    zeros = {n: _zeros(next(x for x in layers if x.weight == n)) for n in counts if n not in totals}
    return {**zeros, **{n: t.div_(max(1, counts[n])).cpu() for n, t in totals.items()}}


def _zeros(layer: Layer, device: Any = "cpu") -> Tensor:
    import torch

    return torch.zeros(layer.gram, dtype=torch.float64, device=device)


@contextmanager
def watched(
    module: nn.Module,
    layers: Sequence[Layer],
    see: Callable[[Layer, tuple[Any, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """While entered, ``see`` is called with what comes into each layer.

    Torch's fused attention is off: it computes layers without calling them.
    """
    import torch

    parts = dict(module.named_modules())
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, before)
        for layer in layers:

            def hook(_part: Any, args: Any, kwargs: Any, layer: Layer = layer) -> None:
                see(layer, args, kwargs)

            handle = parts[layer.module].register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
