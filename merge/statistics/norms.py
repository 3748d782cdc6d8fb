"""Running statistics of BatchNorm layers, measured anew.

Weights that were averaged have other activations than those whose statistics were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError
from merge.statistics.runs import evaluating, run

if TYPE_CHECKING:
    from torch import nn

__all__ = ["batch_norms", "measure_norms", "measuring"]


def batch_norms(module: nn.Module) -> dict[str, Any]:
    """The layers that keep statistics of the batches they are trained on, by name."""
    from torch import nn

    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    }


@contextmanager
def measuring(layers: Iterable[Any], momentum: float | None) -> Iterator[None]:
    """While entered, the layers weigh each batch so if they are in training mode.

    momentum: of the latest batch; None for the plain mean, in which each batch weighs the same.
    """
    before = [(layer, layer.momentum) for layer in layers]
    try:
        for layer, _ in before:
            layer.momentum = momentum
        yield
    finally:
        for layer, own in before:
            layer.momentum = own


def measure_norms(module: nn.Module, batches: Iterable[Any]) -> tuple[str, ...]:
    """Measure the statistics of BatchNorm anew, in place; the names of the layers that have some.

    The mean over the batches, each weighing the same; all other layers are as in evaluation.
    PlanError where there are no batches.
    """
    layers = batch_norms(module)
    if not layers:
        return ()
    seen = False
    with evaluating(module), measuring(layers.values(), None):
        for layer in layers.values():
            layer.train()
            layer.reset_running_stats()
        for batch in batches:
            seen = True
            run(module, batch)
    if not seen:
        raise PlanError("there is no data to measure BatchNorm on", found="no batches")
    return tuple(layers)
