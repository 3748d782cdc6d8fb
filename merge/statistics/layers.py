"""Linear layers of a network, and what comes into them as rows of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Layer", "linear_layers", "masks_of", "tied_names", "unpadded"]

Rows = Callable[[tuple[Any, ...], dict[str, Any], Sequence["Tensor"]], "Tensor"]
"""From a call's arguments and masks of tokens to inputs, (n, in) or (groups, n, in)."""

MASKS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear map of a network, with the name of its weight there.

    module: the part that is called. gram: the shape of its inputs' Gram matrix.
    """

    weight: str
    module: str
    gram: tuple[int, ...]
    rows: Rows


def linear_layers(module: nn.Module) -> list[Layer]:
    """Linear maps and convolutions, in the network's order; a weight in two layers comes twice.

    Left out are weights that an embedding shares, transposed convolutions, and maps that attention
    computes without calling its parts.
    """
    from torch import nn

    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    found = []
    for name, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            size = part.embed_dim
            weight = names[id(part.in_proj_weight)]
            found.append(Layer(weight, name, (3, size, size), _attention(part.batch_first)))
            continue
        weight_of = getattr(part, "weight", None)
        own = names.get(id(weight_of))
        how = None if own is None or id(weight_of) in tables else _rows_of(part)
        if own is not None and how is not None:
            found.append(Layer(own, name, *how))
    return found


def _rows_of(part: nn.Module) -> tuple[tuple[int, ...], Rows] | None:
    """The shape of a layer's Gram matrix, and its rows; None for what is no such layer."""
    from torch import nn

    if isinstance(part, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # the output projection of torch's attention, which is never called
    if isinstance(part, nn.Linear):
        return (part.in_features, part.in_features), _tokens
    if type(part).__name__ == "Conv1D":  # GPT-2's linear map, with its weight transposed
        width = len(next(part.parameters()))
        return (width, width, 1), _tokens
    if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        inputs = math.prod(part.weight.shape[1:])
        shape = (inputs, inputs) if part.groups == 1 else (part.groups, inputs, inputs)
        return shape, _patches(part)
    return None


def masks_of(inputs: Any) -> list[Tensor]:
    """The masks of tokens, (batch, length), among a network's inputs; true for what counts."""
    if not hasattr(inputs, "keys"):
        return []
    found = (inputs.get(key) for key in MASKS)
    return [m.bool() for m in found if m is not None and m.ndim == 2]


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any], masks: Sequence[Tensor]) -> Tensor:
    """Inputs (..., in) as rows, but for those of padding."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return unpadded(value, masks)


def unpadded(value: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Activations (..., channels) as rows, but for those of padding."""
    for mask in masks:
        if value.shape[:-1] == mask.shape:
            return value[mask.to(value.device)]
    flat = value.reshape(-1, value.shape[-1])
    for mask in masks:
        if value.ndim == 2 and len(flat) == mask.numel() and mask.shape[1] > 1:
            return flat[mask.reshape(-1).to(value.device)]
    return flat


def _attention(batch_first: bool) -> Rows:
    """Query, key and value of torch's attention, one group each, without padded tokens."""

    def rows(args: tuple[Any, ...], kwargs: dict[str, Any], masks: Sequence[Tensor]) -> Tensor:
        import torch

        given = dict(zip(("query", "key", "value", "key_padding_mask"), args, strict=False))
        given.update(kwargs)
        padded = given.get("key_padding_mask")
        if padded is not None and padded.dtype is torch.bool:
            masks = [*masks, ~padded]
        parts = [given[k] for k in ("query", "key", "value")]
        if not batch_first and parts[0].ndim == 3:
            parts = [p.transpose(0, 1) for p in parts]
        found = [unpadded(p, masks) for p in parts]
        most = max(map(len, found))  # rows of zeros add nothing to a Gram matrix
        return torch.stack([torch.nn.functional.pad(f, (0, 0, 0, most - len(f))) for f in found])

    return rows


def _patches(part: Any) -> Rows:
    """What a convolution's kernel sees at each place, one row a place and group."""

    def rows(args: tuple[Any, ...], kwargs: dict[str, Any], _masks: Sequence[Tensor]) -> Tensor:
        from torch.nn import functional

        value: Tensor = args[0] if args else next(iter(kwargs.values()))
        axes = len(part.kernel_size)
        if value.ndim == axes + 1:
            value = value[None]
        mode = "constant" if part.padding_mode == "zeros" else part.padding_mode
        value = functional.pad(value, part._reversed_padding_repeated_twice, mode=mode)
        for axis in range(axes):
            width = (part.kernel_size[axis] - 1) * part.dilation[axis] + 1
            value = value.unfold(2 + axis, width, part.stride[axis])
            value = value[..., :: part.dilation[axis]]
        # (batch, channels, places..., kernel...) to (groups, batch * places, channels * kernel)
        value = value.reshape(len(value), part.groups, -1, *value.shape[2:])
        order = [1, 0, *range(3, 3 + axes), 2, *range(3 + axes, 3 + 2 * axes)]
        value = value.permute(order).reshape(part.groups, -1, math.prod(part.weight.shape[1:]))
        return value if part.groups > 1 else value[0]

    return rows


def tied_names(module: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by each of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {n: same for same in names.values() for n in same}
