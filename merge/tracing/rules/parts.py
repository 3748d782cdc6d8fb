"""Operators that take parts of axes, put parts together, and go by the order of places."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merge.tracing import families
from merge.tracing.atoms import Product, Reason, size_of
from merge.tracing.labels import Chosen, Label
from merge.tracing.refine import concatenated, fresh
from merge.tracing.rules.registry import Call, Ruled, as_list, rule, wrap

__all__: list[str] = []

STRIDED = Reason("stride", "a strided slice, or one that meets no boundary")
PADDED = Reason("padding", "padding")


@rule("slice", "narrow", "slice_copy")
def sliced(call: Call) -> Ruled:
    """A range of an axis: the axis becomes a sum of parts."""
    label, dim = call.label(call["self"]), call["dim"] or 0
    dim %= max(1, len(label.axes))
    length, wanted = call["self"].shape[dim], call.shape[dim]
    start = min(max(0, (call["start"] or 0) + (length if (call["start"] or 0) < 0 else 0)), length)
    if wanted == length and (call["step"] or 1) == 1:
        return label
    if (call["step"] or 1) != 1 or not wanted:
        return wrap(frozen_axis(call, label, dim, wanted, STRIDED))
    return _narrowed(call, label, dim, start, wanted)


@rule("select", "select_copy")
def selected(call: Call) -> Ruled:
    """One place of an axis, which goes away."""
    label, dim = call.label(call["self"]), call["dim"]
    dim %= len(label.axes)
    number = call["index"] % call["self"].shape[dim]
    out = _narrowed(call, label, dim, number, 1)
    chosen = [
        Chosen(c.selection, c.values, tuple(a - (a > dim) for a in c.axes))
        for c in out.chosen
        if dim not in c.axes
    ]
    axes = (*out.axes[:dim], *out.axes[dim + 1 :])
    return Label(axes, out.values, out.selection, tuple(chosen))


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk",
      "unsafe_split_with_sizes", "split_copy", "split_with_sizes_copy")  # fmt: skip
def split(call: Call) -> Ruled:
    """Parts one after the other."""
    label, dim = call.label(call["self"]), call["dim"] or 0
    dim %= len(label.axes)
    out, at = [], 0
    for part in call.out:
        out.append(_narrowed(call, label, dim, at, part.shape[dim]))
        at += part.shape[dim]
    return out


@rule("unbind")
def unbind(call: Call) -> Ruled:
    """Every place of an axis on its own."""
    label, dim = call.label(call["self"]), call["dim"] or 0
    dim %= len(label.axes)
    out = []
    for number in range(len(call.out)):
        part = _narrowed(call, label, dim, number, 1)
        out.append(Label((*part.axes[:dim], *part.axes[dim + 1 :]), part.values))
    return out


def _narrowed(call: Call, label: Label, dim: int, start: int, length: int) -> Label:
    whole = size_of(label.axes[dim]) == length
    axes = (
        list(label.axes) if whole else families.narrow(call.book, label, dim, start, start + length)
    )
    if axes is None:
        axes = frozen_axis(call, label, dim, length, STRIDED)
    chosen = [c for c in label.chosen if dim not in c.axes or whole]
    part = (label.selection, dim, start, length)
    selection = call.book.choice(part) if label.selection and not whole else label.selection
    return Label(tuple(axes), label.values, selection, tuple(chosen))


def frozen_axis(
    call: Call, label: Label, dim: int, length: int, reason: Reason = STRIDED
) -> list[Product]:
    """The axes, with one frozen and another frozen one of ``length`` in its place."""
    call.book.freeze(label.axes[dim], reason)
    axes = list(label.axes)
    axes[dim] = fresh(length, reason)
    return axes


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Ruled:
    """One after the other along an axis, a sum; the other axes are moved alike."""
    tensors: list[Tensor] = [t for t in call["tensors"] if t.numel() or t.ndim > 1]
    labels = [call.label(t) for t in tensors if t.shape[call["dim"] or 0]]
    if not labels:
        return wrap([fresh(n, PADDED) if n else () for n in call.shape])
    dim = (call["dim"] or 0) % len(labels[0].axes)
    axes = list(labels[0].axes)
    for other in labels[1:]:
        for number, axis in enumerate(other.axes):
            if number != dim:
                call.book.same(axes[number], axis)
    axes[dim] = concatenated([label.axes[dim] for label in labels])
    return wrap(axes)


@rule("stack")
def stack(call: Call) -> Ruled:
    """A new axis, in a fixed order; on the others each place may have atoms of its own."""
    labels = [call.label(t) for t in call["tensors"]]
    dim = (call["dim"] or 0) % (len(labels[0].axes) + 1)
    axes = families.stacked(call.book, labels)
    return wrap([*axes[1 : dim + 1], axes[0], *axes[dim + 1 :]])


@rule("constant_pad_nd")
def padded(call: Call) -> Ruled:
    """The same value before and behind: parts of a sum."""
    label, pads = call.label(call["self"]), list(call["pad"])
    axes = list(label.axes)
    for number in range(len(pads) // 2):
        dim = len(axes) - 1 - number
        before, behind = pads[2 * number], pads[2 * number + 1]
        if min(before, behind) < 0:
            axes = frozen_axis(call, wrap(axes), dim, call.shape[dim], PADDED)
            continue
        if before or behind:
            parts = [fresh(n) if n else None for n in (before, behind)]
            sums = [parts[0], axes[dim], parts[1]]
            axes[dim] = concatenated([p for p in sums if p is not None])
    if call["value"]:
        for axis in axes:
            call.book.neutral(axis)
    return wrap(axes)


@rule("roll", "flip", "fliplr", "flipud", "rot90", "tril", "triu", "reflection_pad1d",
      "reflection_pad2d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
      "reflection_pad3d", "diagonal", "diag_embed", "unfold", "cumsum", "cumprod", "logcumsumexp",
      "cummax", "cummin", "logcumsumexp")  # fmt: skip
def ordered(call: Call) -> Ruled:
    """What goes by the order of places along some axes, which are frozen; the others pass."""
    label = call.label(call["self"])
    n = len(label.axes)
    reason = Reason("order", f"its order counts in {call.name}")
    if call.name in ("tril", "triu"):
        dims = [n - 2, n - 1]
    elif "pad" in call.name:
        dims = list(range(n - len(call["padding"]) // 2, n))
    elif call.name in ("diagonal", "diag_embed", "unfold", "rot90"):
        dims = list(range(n))
    else:
        named = call["dims"] if call["dims"] is not None else call["dim"]
        dims = as_list(named, n)
    outs = call.out if isinstance(call.out, tuple | list) else [call.out]
    linear = call.name in ("roll", "flip", "tril", "triu", "cumsum", "reflection_pad2d")
    for k, axis in enumerate(label.axes):
        if k in dims:
            call.book.freeze(axis, reason)
        elif not linear:
            call.book.neutral(axis)
    axes = [
        axis if k < n and k not in dims else fresh(length, reason)
        for k, (axis, length) in enumerate(_pairs(label, outs[0].shape))
    ]
    return [wrap(axes)] * len(outs) if len(outs) > 1 else wrap(axes)


def _pairs(label: Label, shape: Sequence[int]) -> list[tuple[Product, int]]:
    axes = [*label.axes, *[()] * len(shape)]
    return [(axes[k], length) for k, length in enumerate(shape)]
