"""Convolutions, pooling and resizing: channels are mapped, places keep their order."""

from __future__ import annotations

from torch import Tensor

from merge.tracing.atoms import Product, Reason
from merge.tracing.labels import Label
from merge.tracing.refine import cut_product, fresh
from merge.tracing.rules.contraction import multilinear
from merge.tracing.rules.registry import Call, Ruled, rule, wrap

__all__: list[str] = []

PLACES = Reason("kernel", "places of a kernel")
GRID = Reason("grid", "places of a grid")


@rule("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution",
      "thnn_conv2d", "_slow_conv2d_forward", "convolution_overrideable", "conv_transpose1d",
      "conv_transpose2d", "conv_transpose3d")  # fmt: skip
def convolution(call: Call) -> Ruled:
    """Input channels (g, c) are contracted with the kernel's, output channels are (g, o)."""
    names = list(call.arguments)
    given = call[names[0]]
    label, weight = call.label(given), call.label(call["weight"])
    places = call["weight"].ndim - 2
    groups = call["groups"] or 1
    transposed = bool(call["transposed"]) or "transpose" in call.name
    for axis in label.axes[len(label.axes) - places :]:
        call.book.freeze(axis, GRID)
    for axis in weight.axes[2:]:
        call.book.freeze(axis, PLACES)
    batch = label.axes[: len(label.axes) - places - 1]
    outer, inner = weight.axes[:2]
    channels = label.axes[len(batch)]
    ours = _grouped(call, channels, groups)
    # a transposed kernel has input channels (g, c) first and o second
    if transposed:
        grouped, other = _grouped(call, outer, groups), inner
        kernel = wrap([grouped[0], grouped[1], other])
        letters = "gco"
    else:
        grouped = _grouped(call, outer, groups)
        kernel = wrap([grouped[0], grouped[1], inner])
        letters = "goc"
    left = "ab"[: len(batch)]
    source = wrap([*batch, *ours])
    out = multilinear(call, source, kernel, left + "gc", letters, left + "go")
    axis = (*out.axes[-2], *out.axes[-1])
    if isinstance(call["bias"], Tensor):
        call.book.same(axis, call.label(call["bias"]).axes[0])
    grid = [fresh(n, GRID) for n in call.shape[len(batch) + 1 :]]
    return wrap([*out.axes[: len(batch)], axis, *grid])


def _grouped(call: Call, axis: Product, groups: int) -> tuple[Product, Product]:
    """The axis as (groups, within a group)."""
    halves = cut_product(call.book, axis, groups)
    if halves is not None:
        return halves
    call.book.freeze(axis, GRID)
    from merge.tracing.atoms import size_of

    return fresh(groups, GRID), fresh(size_of(axis) // groups, GRID)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d",
      "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
      "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
      "_upsample_nearest_exact2d", "_upsample_nearest_exact1d", "grid_sampler_2d")  # fmt: skip
def pooled(call: Call) -> Ruled:
    """Linear over places: channels pass."""
    label = call.label(call["self"] if call["self"] is not None else call["input"])
    return _over_places(call, label)


@rule("max_pool2d_with_indices", "max_pool1d", "max_pool2d", "max_pool3d",
      "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool1d")  # fmt: skip
def max_pooled(call: Call) -> Ruled:
    """The largest over places: channels pass, their scales too, their signs not."""
    label = call.label(call["self"])
    for axis in label.axes:
        call.book.neutral(axis, scales=False)
    out = _over_places(call, label)
    return [out, out] if isinstance(call.out, tuple | list) else out


def _over_places(call: Call, label: Label) -> Label:
    """Channels as they are, and a new grid."""
    first = call.out[0] if isinstance(call.out, tuple | list) else call.out
    names = ("kernel_size", "output_size", "size", "scale_factors")
    places = max(1, _places(call, names, len(label.axes)))
    keep = len(label.axes) - places
    for axis in label.axes[keep:]:
        call.book.freeze(axis, GRID)
    return wrap([*label.axes[:keep], *(fresh(n, GRID) for n in first.shape[keep:])])


def _places(call: Call, names: tuple[str, ...], ndim: int) -> int:
    """How many of the last axes are places: as the operator's name says."""
    for digit in "123":
        if f"{digit}d" in call.name:
            return int(digit)
    return ndim - 2


@rule("im2col", "col2im")
def unfolded(call: Call) -> Ruled:
    """Channels (c, kernel), the places being one axis, or back."""
    label = call.label(call["self"])
    *batch, channels = label.axes[: -1 if call.name == "col2im" else -2]
    rest = label.axes[len(batch) + 1 :]
    for axis in rest:
        call.book.freeze(axis, GRID)
    if call.name == "im2col":
        size = call.shape[len(batch)] // call["self"].shape[len(batch)]
        return wrap([*batch, (*channels, *fresh(size, PLACES)), fresh(call.shape[-1], GRID)])
    halves = _grouped(call, channels, call.shape[len(batch)])
    call.book.freeze(halves[1], PLACES)
    return wrap([*batch, halves[0], *(fresh(n, GRID) for n in call.shape[-2:])])
