"""Operators that put axes together, take them apart, and set them in another order."""

from __future__ import annotations

from collections.abc import Sequence

from merge.tracing.atoms import Product, Reason, size_of
from merge.tracing.labels import Chosen, Label
from merge.tracing.refine import cut_product, fresh
from merge.tracing.rules.registry import Call, Ruled, rule, wrap

__all__: list[str] = []

ACROSS = Reason("shape", "a view across the boundaries of factors")


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "view_copy", "flatten", "unflatten",
      "_reshape_copy", "unsqueeze", "squeeze")  # fmt: skip
def view(call: Call) -> Ruled:
    """Row-major the same elements: axes are joined, or taken apart into products."""
    return _reshaped(call, call.label(call["self"]), tuple(call["self"].shape), call.shape)


def _reshaped(call: Call, label: Label, old: Sequence[int], new: Sequence[int]) -> Label:
    """The label after a reshape from one shape to another."""
    axes: list[Product] = []
    place: dict[int, list[int]] = {}  # where each old axis went to
    for ours, theirs in _groups(old, new):
        rest: Product = tuple(r for k in ours for r in label.axes[k])
        for k in theirs:
            halves = cut_product(call.book, rest, new[k]) if new[k] != 0 else None
            if halves is None:
                call.book.freeze(rest, ACROSS)
                axes += [fresh(new[m], ACROSS) for m in theirs if m >= len(axes)]
                break
            axes.append(halves[0])
            rest = halves[1]
        for k in ours:
            place[k] = list(theirs)
    values = label.values
    chosen = []
    for c in label.chosen:
        if list(c.axes) == sorted(c.axes):
            to = dict.fromkeys(n for a in c.axes for n in place.get(a, []) if new[n] > 1)
            chosen.append(Chosen(c.selection, c.values, tuple(to)))
    return Label(tuple(axes), values, label.selection, tuple(c for c in chosen if c.axes))


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which old axes become which new ones: the smallest runs of equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = k = 0
    if 0 in old or 0 in new:
        return [(list(range(len(old))), list(range(len(new))))]
    while i < len(old) or k < len(new):
        ours, theirs, left, right = list[int](), list[int](), 1, 1
        while not (ours or theirs) or left != right:
            if i < len(old) and (left <= right or k >= len(new)) and not (left == right and ours):
                left, ours, i = left * old[i], [*ours, i], i + 1
            elif k < len(new):
                right, theirs, k = right * new[k], [*theirs, k], k + 1
            else:
                break
        groups.append((ours, theirs))
    return groups


@rule("as_strided")
def restrided(call: Call) -> Ruled:
    """Pooling states the strides of its output anew: the same elements in the same order."""
    label = call.label(call["self"])
    sizes, dense = [size_of(a) for a in label.axes], 1
    if sizes != list(call["size"]):
        return None
    for length, stride in reversed(list(zip(sizes, call["stride"], strict=True))):
        if length > 1 and stride != dense:
            return None
        dense *= length
    return label


@rule("permute", "transpose", "t", "movedim", "swapaxes", "numpy_T", "adjoint", "mT")
def permuted(call: Call) -> Ruled:
    """Axes in another order."""
    label = call.label(call["self"])
    n = len(label.axes)
    if call["dims"] is not None:
        order = [d % n for d in call["dims"]]
    elif call["dim0"] is not None:
        order = list(range(n))
        a, b = (call["dim0"] % n, call["dim1"] % n) if n else (0, 0)
        if n:
            order[a], order[b] = b, a
    else:
        order = list(reversed(range(n)))
    chosen = [
        Chosen(c.selection, c.values, tuple(order.index(a) for a in c.axes)) for c in label.chosen
    ]
    selection = label.selection if order == sorted(order) else 0
    return Label(tuple(label.axes[k] for k in order), label.values, selection, tuple(chosen))


@rule("expand", "expand_as", "broadcast_to")
def expanded_axes(call: Call) -> Ruled:
    """Copies along axes of length 1: the copies may be exchanged."""
    label = call.label(call["self"])
    shift = len(call.shape) - len(label.axes)
    axes: list[Product] = []
    same: set[int] = set()
    for k, length in enumerate(call.shape):
        old = label.axes[k - shift] if k >= shift else ()
        if size_of(old) != length:
            old = _copies(call, length)
            same.add(k)
        axes.append(old)
    chosen = tuple(
        Chosen(c.selection, c.values, tuple(a + shift for a in c.axes)) for c in label.chosen
    )
    return Label(tuple(axes), label.values, label.selection, chosen, uniform=frozenset(same))


def _copies(call: Call, count: int) -> Product:
    """The axis that numbers copies: they may be exchanged, but have the same sign and scale."""
    axis = fresh(count)
    call.book.neutral(axis)
    return axis


@rule("repeat")
def repeated(call: Call) -> Ruled:
    """The whole axis again and again: the number of the copy is the outer factor."""
    label = call.label(call["self"])
    shift = len(call.shape) - len(label.axes)
    axes = [
        (*_copies(call, times), *(label.axes[k - shift] if k >= shift else ()))
        for k, times in enumerate(call["repeats"])
    ]
    return Label(tuple(axes), label.values)


@rule("repeat_interleave")
def interleaved(call: Call) -> Ruled:
    """Each element again and again: the number of the copy is the inner factor."""
    label = call.label(call["self"])
    if call["dim"] is None or not isinstance(call["repeats"], int):
        return None
    axes = list(label.axes)
    axes[call["dim"]] = (*axes[call["dim"]], *_copies(call, call["repeats"]))
    return Label(tuple(axes), label.values)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Ruled:
    """Channels (g, c) to (c, g)."""
    label = call.label(call["self"])
    axes = list(label.axes)
    halves = cut_product(call.book, axes[1], call["groups"])
    if halves is None:
        return None
    axes[1] = (*halves[1], *halves[0])
    return wrap(axes)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> Ruled:
    """Channels (c, r, r) and places (h, w) to channels c and places (h, r, w, r), or back."""
    label = call.label(call["self"])
    *batch, channels, high, wide = label.axes
    reason = Reason("place", f"becomes places in {call.name}")
    call.book.freeze([*high, *wide], reason)
    size = call.shape[-3] if call.name == "pixel_shuffle" else call["self"].shape[-3]
    halves = cut_product(call.book, channels, size)
    if halves is None:
        call.book.freeze(channels, reason)
        halves = (fresh(size, reason), ())
    call.book.freeze(halves[1], reason)
    inner = fresh(call.shape[-3] // size, reason)
    ends = [fresh(n, reason) for n in call.shape[-2:]]
    return wrap([*batch, (*halves[0], *inner), *ends])


@rule("view_as_complex", "view_as_real")
def complex_view(call: Call) -> Ruled:
    """The last axis, real and imaginary part, goes into the numbers, or comes out of them."""
    label = call.label(call["self"])
    reason = Reason("place", "real and imaginary part")
    if call.name == "view_as_real":
        return wrap([*label.axes, fresh(2, reason)], label.chosen)
    call.book.freeze(label.axes[-1], reason)
    return wrap(label.axes[:-1])
