"""Functions of each element on its own, with broadcasting; sums and products are elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from merge.tracing.atoms import Product, Ref
from merge.tracing.labels import Chosen, Label
from merge.tracing.rules.registry import Call, Ruled, rule, wrap

__all__ = ["aligned", "chosen_along", "combined", "general", "uniform_along"]


@rule(
    "neg", "clone", "_to_copy", "alias", "detach", "contiguous", "lift_fresh", "positive",
    "native_dropout", "dropout", "alpha_dropout", "_conj", "resolve_conj", "resolve_neg",
    "real", "imag", "view_as", "to", "lift", "_neg_view",
)  # fmt: skip
def passes(call: Call) -> Ruled:
    """Linear, or nothing at all: the label of the operand."""
    label = call.label(call["self"] if call["self"] is not None else call["input"])
    return [label, label] if isinstance(call.out, tuple | list) else label


@rule("tanh", "sin", "asinh", "erf", "atan", "sinh", "tan", "asin", "round", "trunc")
def odd(call: Call) -> Ruled:
    """f(-x) = -f(x): signs pass, scales do not."""
    label = call.label(call["self"])
    for axis in label.axes:
        call.book.neutral(axis, signs=False)
    return label


@rule("relu", "leaky_relu", "threshold_backward")
def homogeneous(call: Call) -> Ruled:
    """f(sx) = s f(x) for positive s: scales pass, signs do not."""
    label = call.label(call["self"])
    for axis in label.axes:
        call.book.neutral(axis, scales=False)
    return label


@rule("abs")
def absolute(call: Call) -> Ruled:
    """Scales pass, signs vanish."""
    return _powers(call, signs=0, scales=1)


@rule("sign", "sgn")
def sign(call: Call) -> Ruled:
    """Signs pass, scales vanish."""
    return _powers(call, signs=1, scales=0)


@rule("pow")
def power(call: Call) -> Ruled:
    """A whole power multiplies charges; any other takes what is positive only."""
    exponent = call["exponent"]
    if isinstance(exponent, int | float) and float(exponent).is_integer():
        return _powers(call, int(exponent), int(exponent)) if call.labels() else None
    return general(call)


@rule("square")
def square(call: Call) -> Ruled:
    """The second power."""
    return _powers(call, 2, 2)


@rule("reciprocal")
def reciprocal(call: Call) -> Ruled:
    """The power of minus one."""
    return _powers(call, 1, -1)


def _powers(call: Call, signs: int, scales: int) -> Label:
    """The label of a power of the operand, its charges multiplied."""
    label = call.label(call["self"])
    axes: list[Product] = []
    for axis in label.axes:
        call.book.fix_rotation(axis)
        out = tuple(Ref(r.atom, r.dual) for r in axis)
        for old, new in zip(axis, out, strict=True):
            call.book.equate((signs, old), (-1, new), scales=False)
            call.book.equate((scales, old), (-1, new), signs=False)
        axes.append(out)
    return wrap(axes, label.chosen)


@rule(
    "exp", "log", "gelu", "silu", "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "elu", "celu",
    "selu", "mish", "softplus", "cos", "cosh", "acos", "sqrt", "rsqrt", "log1p", "expm1", "log2",
    "log10", "exp2", "clamp", "clamp_min", "clamp_max", "floor", "ceil", "logical_not",
    "bitwise_not", "isnan", "isinf", "isfinite", "nan_to_num", "log_sigmoid", "log_sigmoid_forward",
    "softshrink", "hardshrink", "logit", "erfc", "erfinv", "special_expit", "digamma", "lgamma",
    "frac", "angle", "relu6", "polar", "complex", "xlogy", "atan2", "hypot",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and",
    "bitwise_or", "bitwise_xor", "maximum", "minimum", "fmod", "remainder", "floor_divide",
    "fmax", "fmin", "__and__", "__or__", "__xor__", "isclose", "rrelu_with_noise", "threshold",
    "special_xlog1py", "isposinf", "isneginf",
)  # fmt: skip
def general(call: Call) -> Ruled:
    """Any function of each element: permutations pass, nothing else does."""
    labels = call.labels()
    outs = call.out if isinstance(call.out, tuple | list) else [call.out]
    ndim = outs[0].ndim
    axes: list[Product] = []
    for operands in aligned(labels, ndim):
        present = [a for a in operands if a]
        for axis in present:
            call.book.match(present[0], axis)
            call.book.neutral(axis)
        axes.append(present[0] if present else ())
    label = combined(axes, labels)
    return label if len(outs) == 1 else [label if o.ndim == ndim else None for o in outs]


def aligned(labels: Sequence[Label], ndim: int) -> list[tuple[Product, ...]]:
    """For each axis of the output the operands' axes, empty where they are broadcast.

    An operand whose values are the same along an axis is as good as broadcast beside one that has
    values of its own.
    """
    out: list[tuple[Product, ...]] = []
    for number in range(ndim):
        places = [(label, number - ndim + len(label.axes)) for label in labels]
        axes = [label.axes[k] if k >= 0 else () for label, k in places]
        alike = [k in label.uniform for label, k in places]
        own = any(axis and not same for axis, same in zip(axes, alike, strict=True))
        out.append(tuple(() if own and a else x for x, a in zip(axes, alike, strict=True)))
    return out


def uniform_along(labels: Sequence[Label], ndim: int) -> frozenset[int]:
    """The axes of the output along which no operand has values of its own."""
    return frozenset(
        number
        for number in range(ndim)
        if all(
            k < 0 or not label.axes[k] or k in label.uniform
            for label in labels
            for k in [number - ndim + len(label.axes)]
        )
    )


def combined(axes: Sequence[Product], labels: Sequence[Label]) -> Label:
    """The label of an elementwise function of several operands."""
    chosen, uniform = chosen_along(labels, len(axes)), uniform_along(labels, len(axes))
    return Label(tuple(axes), chosen=chosen, uniform=uniform)


def chosen_along(labels: Sequence[Label], ndim: int) -> tuple[Chosen, ...]:
    """What was chosen along the axes of the operands, counted as in the output."""
    found: dict[tuple[int, tuple[int, ...]], Chosen] = {}
    for label in labels:
        shift = ndim - len(label.axes)
        for c in label.chosen:
            axes = tuple(a + shift for a in c.axes)
            found[c.selection, axes] = Chosen(c.selection, c.values, axes)
    return tuple(found.values())
