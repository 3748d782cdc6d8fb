"""Operators that look up places by number.

Where the numbers are those of another axis (top-k of router scores), that axis and the one that is
looked up are moved alike: so experts may change places. Any other numbers freeze what they index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge.tracing.atoms import Product, Reason
from merge.tracing.families import narrow
from merge.tracing.labels import Chosen, Label
from merge.tracing.refine import fresh
from merge.tracing.rules.registry import Call, Ruled, rule, wrap

__all__ = ["BY_NUMBER", "freeze_values", "indexed", "look_up"]

BY_NUMBER = Reason("number", "looked up by number")
_MASKS = (torch.bool, torch.uint8)


def look_up(call: Call, axis: Product, index: Label, reason: Reason = BY_NUMBER) -> None:
    """The axis is looked up by the numbers of ``index``."""
    if index.values is None:
        call.book.freeze(axis, reason)
    else:
        call.book.match(axis, index.values)
        call.book.neutral(axis)


@rule("embedding")
def embedding(call: Call) -> Ruled:
    """Rows by number."""
    weight, index = call.label(call["weight"]), call.label(call["indices"])
    look_up(call, weight.axes[0], index, Reason("token", "rows are looked up by number"))
    return _looked_up(weight, 0, index)


@rule("index_select")
def index_select(call: Call) -> Ruled:
    """Places along one axis by number."""
    label, index = call.label(call["self"]), call.label(call["index"])
    dim = call["dim"] % max(1, len(label.axes))
    look_up(call, label.axes[dim], index)
    return _looked_up(label, dim, index)


def _looked_up(label: Label, dim: int, index: Label) -> Label:
    """The axis gives way to those of the index; along them one of its coordinates was chosen."""
    count = len(index.axes)
    axes = [*label.axes[:dim], *index.axes, *label.axes[dim + 1 :]]
    chosen = [
        Chosen(c.selection, c.values, tuple(a + (count - 1 if a > dim else 0) for a in c.axes))
        for c in label.chosen
        if dim not in c.axes
    ]
    if index.values is not None and index.selection:
        places = tuple(dim + k for k in range(count))
        chosen.append(Chosen(index.selection, index.values, places))
    return wrap(axes, chosen)


@rule("index", "_unsafe_index")
def index(call: Call) -> Ruled:
    """Places along several axes by number, or by a mask."""
    label = call.label(call["self"])
    given: list[tuple[int, Tensor]] = [
        (k, i) for k, i in enumerate(call["indices"]) if isinstance(i, Tensor)
    ]
    if len(given) == 1 and not given[0][1].is_floating_point():
        dim, numbers = given[0]
        if numbers.dtype not in _MASKS:
            own = call.label(numbers)
            if own.literal and (run := _run(numbers, call["self"].shape[dim])) is not None:
                axes = narrow(call.book, label, dim, run, run + numbers.numel())
                if axes is not None:
                    return wrap(axes)
            look_up(call, label.axes[dim], own)
            return _looked_up(label, dim, own)
    dims = indexed(given)
    if all(i.dtype in _MASKS for _, i in given):
        pending = tuple(label.axes[k] for k in dims)
        return Label(tuple(_index_axes(call, label, given, dims)), pending=pending)
    for k in dims:
        call.book.freeze(label.axes[k], BY_NUMBER)
    for _, i in given:
        freeze_values(call, call.label(i))
    return wrap(_index_axes(call, label, given, dims))


def _run(numbers: Tensor, length: int) -> int | None:
    """The first of numbers that follow one another, as code may write a slice; None for others."""
    if numbers.ndim != 1 or not numbers.numel():
        return None
    places = [n % length for n in numbers.tolist()]
    return places[0] if places == list(range(places[0], places[0] + len(places))) else None


def indexed(given: Sequence[tuple[int, Tensor]]) -> list[int]:
    """The axes that indices speak of; a mask of several axes speaks of as many."""
    dims: list[int] = []
    shift = 0
    for k, i in given:
        wide = i.ndim if i.dtype in _MASKS else 1
        dims += [k + shift + n for n in range(wide)]
        shift += wide - 1
    return dims


def _index_axes(
    call: Call, label: Label, given: Sequence[tuple[int, Tensor]], dims: list[int]
) -> list[Product]:
    """The axes of ``self[indices]``: those looked up give way to frozen ones."""
    kept = [a for k, a in enumerate(label.axes) if k not in dims]
    count = len(call.shape) - len(kept)
    together = dims == list(range(dims[0], dims[0] + len(dims)))
    at = dims[0] if together else 0
    new = [fresh(n, BY_NUMBER) for n in call.shape[at : at + count]]
    return [*kept[:at], *new, *kept[at:]]


def freeze_values(call: Call, label: Label) -> None:
    if label.values is not None:
        call.book.freeze(label.values, BY_NUMBER)


@rule("gather", "take_along_dim")
def gather(call: Call) -> Ruled:
    """Along one axis an element for each of the index; the other axes go together."""
    label = call.label(call["self"])
    numbers = call.label(call["index"] if call["index"] is not None else call["indices"])
    dim = call["dim"] % max(1, len(label.axes))
    look_up(call, label.axes[dim], numbers)
    axes: list[Product] = []
    for k, (axis, own) in enumerate(zip(label.axes, numbers.axes, strict=True)):
        axes.append(own if k == dim else _together(call, axis, own, k))
    return wrap(axes)


def _together(call: Call, axis: Product, own: Product, k: int) -> Product:
    """An axis along which tensor and index go in step."""
    if axis and own:
        call.book.match(axis, own)
        call.book.fix_rotation(axis)
    return axis if own else own
