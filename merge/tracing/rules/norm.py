"""Normalisation: by layer, group, batch statistics, or root mean square."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merge.tracing.atoms import Product, Ref
from merge.tracing.labels import Label
from merge.tracing.refine import cut_product
from merge.tracing.rules.reduction import without
from merge.tracing.rules.registry import Call, Ruled, rule, wrap

__all__: list[str] = []


@rule("native_layer_norm", "layer_norm")
def layer_norm(call: Call) -> Ruled:
    """Mean 0 and variance 1 over the last axes, then a gain and a shift for each coordinate."""
    label = call.label(call["input"])
    count = len(call["normalized_shape"])
    dims = list(range(len(label.axes) - count, len(label.axes)))
    for axis in label.axes:
        call.book.neutral(axis)
    for name in ("weight", "bias"):
        _affine(call, name, [label.axes[k] for k in dims])
    without(call, label, dims)
    statistic = wrap([() if k in dims else a for k, a in enumerate(label.axes)])
    return [label, statistic, statistic] if isinstance(call.out, tuple | list) else label


@rule("rms_norm", "_fused_rms_norm")
def rms_norm(call: Call) -> Ruled:
    """Mean square 1 over the last axes, then a gain: signs pass."""
    label = call.label(call["input"])
    count = len(call["normalized_shape"])
    dims = list(range(len(label.axes) - count, len(label.axes)))
    for k, axis in enumerate(label.axes):
        call.book.neutral(axis, signs=k not in dims)
    _affine(call, "weight", [label.axes[k] for k in dims])
    without(call, label, dims)
    statistic = wrap([() if k in dims else a for k, a in enumerate(label.axes)])
    return [label, statistic] if isinstance(call.out, tuple | list) else label


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> Ruled:
    """Mean 0 and variance 1 within groups of channels (axis 1), then a gain and a shift."""
    label = call.label(call["input"])
    groups = call["group"] if call["group"] is not None else call["num_groups"]
    for axis in label.axes:
        call.book.neutral(axis)
    for name in ("weight", "bias"):
        _affine(call, name, [label.axes[1]])
    halves = cut_product(call.book, label.axes[1], groups)
    if halves is None:
        from merge.tracing.book import MISFIT

        call.book.freeze(label.axes[1], MISFIT)
        halves = (label.axes[1], ())
    statistic = wrap([label.axes[0], halves[0] if halves[1] or groups > 1 else ()])
    call.book.record(statistic)
    if not isinstance(call.out, tuple | list):
        return label
    return [label, *(_fitting(statistic, o) for o in call.out[1:])]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "batch_norm", "_native_batch_norm_legit", "miopen_batch_norm",
      "_batch_norm_no_update", "_batch_norm_with_update")  # fmt: skip
def batch_norm(call: Call) -> Ruled:
    """Each channel (axis 1) by its own statistics, then a gain and a shift.

    A channel may change its sign, together with its mean; the epsilon beside the variance forbids
    scales. After that gain and shift may be scaled, and the next map scaled back.
    """
    label = call.label(call["input"])
    channels = label.axes[1]
    call.book.fix_rotation(channels)
    call.book.neutral(channels, signs=False)
    for name, signs in (("running_mean", True), ("running_var", False)):
        if isinstance(call[name], Tensor):
            own = call.label(call[name]).axes[0]
            pairs = call.book.match(channels, own)
            call.book.neutral(own, signs=not signs)
            for a, b in pairs if signs else ():
                call.book.equate((1, a), (-1, b), scales=False)
    out = channels
    if isinstance(call["weight"], Tensor):
        weight = call.label(call["weight"]).axes[0]
        call.book.neutral(weight, scales=False)
        out = call.book.times(channels, weight)
        if isinstance(call["bias"], Tensor):
            call.book.same(out, call.label(call["bias"]).axes[0])
    axes = [label.axes[0], out, *label.axes[2:]]
    if not isinstance(call.out, tuple | list):
        return wrap(axes)
    return [wrap(axes), *(_fitting(wrap([channels]), o) for o in call.out[1:])]


def _affine(call: Call, name: str, axes: Sequence[Product]) -> None:
    """A gain or shift has the axes that were normalised."""
    if isinstance(call[name], Tensor):
        for axis, own in zip(axes, call.label(call[name]).axes, strict=True):
            call.book.match(axis, own)
            call.book.neutral(own)


def _fitting(label: Label, out: Tensor) -> Label | None:
    """The label where its sizes are those of a statistic that came out; None where they are not."""
    sizes = tuple(_length(axis) for axis in label.axes)
    return label if sizes == tuple(out.shape) else None


def _length(axis: Sequence[Ref]) -> int:
    from merge.tracing.atoms import size_of

    return size_of(axis)
