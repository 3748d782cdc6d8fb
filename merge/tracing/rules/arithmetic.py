"""Sums and products of each two elements, choices between them, and gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from merge.tracing.atoms import Product, Ref
from merge.tracing.families import narrow
from merge.tracing.labels import Label
from merge.tracing.rules.pointwise import aligned, combined, general
from merge.tracing.rules.registry import Call, Ruled, rule, wrap

__all__: list[str] = []


@rule("add", "sub", "rsub", "copy", "fill")
def added(call: Call) -> Ruled:
    """A sum: the operands are moved alike; a constant beside an axis lets it be permuted only."""
    names = ("self", "src") if call.name == "copy" else ("self", "other")
    operands = [call[n] for n in names]
    if not all(isinstance(o, Tensor) for o in operands):
        label = call.label(next(v for v in call.arguments.values() if isinstance(v, Tensor)))
        for axis in label.axes:
            call.book.neutral(axis)
        return replace(label, zero=False)
    if call.name == "copy" and operands[0].shape == operands[1].shape:
        return call.label(operands[1])
    labels = [call.label(o) for o in operands]
    shown = [(label, o) for label, o in zip(labels, operands, strict=True) if not label.zero]
    if len(shown) == 1 and shown[0][1].shape == call.out.shape:
        return shown[0][0]  # nothing was added
    return _joined(call, labels)


def _joined(call: Call, labels: Sequence[Label]) -> Label:
    axes: list[Product] = []
    for operands in aligned(labels, len(call.shape)):
        present = [a for a in operands if a]
        for other in present[1:]:
            call.book.same(present[0], other)
        if present and len(present) < len(operands):
            call.book.neutral(present[0])
        axes.append(present[0] if present else ())
    return combined(axes, labels)


@rule("where")
def where(call: Call) -> Ruled:
    """One of two, element by element: they are moved alike, and the condition with them."""
    if not all(isinstance(call[n], Tensor) for n in ("self", "other")):
        return general(call) if isinstance(call.out, Tensor) else None
    labels = [call.label(call[n]) for n in ("self", "other")]
    condition = call.label(call["condition"])
    out = _joined(call, labels)
    axes: list[Product] = []
    for axis, mask in aligned([out, condition], len(out.axes)):
        if mask and axis:
            _guard(call, axis, mask)
        axes.append(axis or mask)
    return combined(axes, [*labels, condition])


def _guard(call: Call, axis: Product, mask: Product) -> None:
    """Each coordinate has a condition of its own, which has no sign and no scale."""
    call.book.match(axis, mask)
    call.book.fix_rotation(axis)
    call.book.neutral(mask)


@rule("masked_fill")
def masked_fill(call: Call) -> Ruled:
    """The operand with some elements replaced; by zero, signs and scales pass."""
    label, mask = call.label(call["self"]), call.label(call["mask"])
    value = call["value"]
    zero = isinstance(value, int | float) and value == 0
    axes: list[Product] = []
    for axis, other in aligned([label, mask], len(call.shape)):
        if axis and other:
            _guard(call, axis, other)
        if axis and not zero:
            call.book.neutral(axis)
        axes.append(axis or other)
    return combined(axes, [label, mask])


@rule("mul", "div", "true_divide")
def multiplied(call: Call) -> Ruled:
    """A product: charges are added (a quotient: subtracted); a lone axis passes as it is."""
    one, other = call["self"], call["other"]
    if call["rounding_mode"]:
        return general(call)
    if not isinstance(other, Tensor):
        return call.label(one)
    inverse = call.name != "mul"
    labels = [call.label(one), call.label(other)]
    gains = [gain(label) for label in labels]
    axes: list[Product] = []
    for left, right in aligned(labels, len(call.shape)):
        for axis, of_gain in zip((left, right), gains, strict=True):
            if of_gain and left and right:
                call.book.neutral(axis)
        if left and right:
            axes.append(call.book.times(left, right, inverse=inverse))
        else:
            axes.append(_inverted(call, right) if right and inverse else left or right)
    return combined(axes, labels)


def _inverted(call: Call, axis: Product) -> Product:
    """The axis of a divisor that the dividend does not have."""
    call.book.fix_rotation(axis)
    out = tuple(Ref(r.atom, r.dual) for r in axis)
    for old, new in zip(axis, out, strict=True):
        call.book.equate((1, old), (1, new))
    return out


def gain(label: Label) -> bool:
    """Whether it is a parameter with one axis: its signs and scales are taken as they are.

    They could be moved into the next map. But gains are near one in all networks, and there is
    nothing to be gained by turning some of them over.
    """
    return label.parameter and len(label.axes) == 1


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Ruled:
    """Leaky with a slope for each channel (axis 1): scales pass."""
    label, slope = call.label(call["self"]), call.label(call["weight"])
    axis = 1 if len(label.axes) > 1 and len(slope.axes) == 1 else 0
    for number, product in enumerate(label.axes):
        call.book.neutral(product, scales=False)
        own = slope.axes[number if len(slope.axes) == len(label.axes) else 0]
        if own and (number == axis or len(slope.axes) == len(label.axes)):
            call.book.match(product, own)
            call.book.neutral(own)
    return label


@rule("glu")
def glu(call: Call) -> Ruled:
    """The first half of an axis times the sigmoid of the second."""
    label = call.label(call["self"])
    dim = (-1 if call["dim"] is None else call["dim"]) % len(label.axes)
    half = call.shape[dim]
    first = narrow(call.book, label, dim, 0, half)
    second = narrow(call.book, label, dim, half, 2 * half)
    if first is None or second is None:
        return None
    axes: list[Product] = []
    for left, right in zip(first, second, strict=True):
        call.book.neutral(right)
        axes.append(call.book.times(left, right))
    return wrap(axes, label.chosen)
