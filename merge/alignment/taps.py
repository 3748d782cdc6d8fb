"""Where activations are looked at: inputs and outputs of layers, whose channels are known groups.

A layer's weight says what its channels are: the rows of a linear map index its outputs, the columns
its inputs, the entries of a norm's gain both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.symmetry.axes import Axis, factors_of
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Tap", "taps_of", "watched"]


@dataclass(frozen=True, slots=True)
class Tap:
    """A layer's output, or its input, whose channels on axis ``channel`` are ``axis``."""

    module: str
    output: bool
    channel: int  # of the activation: -1, or 1 for convolutions
    axis: Axis


def taps_of(module: nn.Module, symmetry: Symmetry) -> list[Tap]:
    """All places at which channels of some group pass, in the module's order."""
    found = []
    for name, layer in module.named_modules():
        places = _places(layer)
        layout = symmetry.tensors.get(f"{name}.weight" if name else "weight")
        if places is None or layout is None:
            continue
        for output, channel, k in places:
            if k < len(layout.axes) and any(f.group for f in factors_of(layout.axes[k])):
                found.append(Tap(name, output, channel, layout.axes[k]))
    return found


def _places(layer: nn.Module) -> list[tuple[bool, int, int]] | None:
    """Whether output, which axis of the activation, which axis of the weight; None if unknown."""
    from torch import nn

    kind = type(layer).__name__
    if isinstance(layer, nn.Linear):
        return [(True, -1, 0), (False, -1, 1)]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return [(True, 1, 1), (False, 1, 0)] if layer.groups == 1 else [(False, 1, 0)]
    if isinstance(layer, nn.modules.conv._ConvNd):
        return [(True, 1, 0), (False, 1, 1)] if layer.groups == 1 else [(True, 1, 0)]
    if isinstance(layer, nn.Embedding):
        return [(True, -1, 1)]
    if kind == "Conv1D":  # a linear map with its weight transposed, in GPT-2
        return [(True, -1, 1), (False, -1, 0)]
    if isinstance(layer, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return [(True, 1, 0), (False, 1, 0)]
    if kind.endswith("Norm"):
        return [(True, -1, 0), (False, -1, 0)]
    return None


@contextmanager
def watched(
    module: nn.Module, taps: list[Tap], see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """While entered, ``see`` is called with each tap's number and its activation."""
    from torch import Tensor

    layers = dict(module.named_modules())

    def hook(number: int, tap: Tap) -> Any:
        def after(layer: Any, args: tuple[Any, ...], out: Any) -> None:
            value = out if tap.output else args[0] if args else None
            if isinstance(value, Tensor):
                see(number, value.detach())

        return layers[tap.module].register_forward_hook(after)

    with ExitStack() as stack:
        for number, tap in enumerate(taps):
            stack.callback(hook(number, tap).remove)
        yield
