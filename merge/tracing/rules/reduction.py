"""Operators that take axes together: sums, means, maxima, softmax, ranks."""

from __future__ import annotations

from merge.tracing.atoms import Product, Reason
from merge.tracing.labels import Chosen, Label
from merge.tracing.refine import fresh
from merge.tracing.rules.registry import Call, Ruled, as_list, rule, wrap

__all__ = ["reduced"]

RANK = Reason("rank", "counts ranks")


@rule("sum", "mean", "nansum", "nanmean")
def total(call: Call) -> Ruled:
    """A sum: what goes is only permuted, and the other axes pass."""
    label = call.label(call["self"])
    dims = as_list(call["dim"], len(label.axes))
    for k in dims:
        call.book.neutral(label.axes[k])
    return reduced(call, label, dims)


@rule("linalg_vector_norm", "norm", "frobenius_norm")
def norm(call: Call) -> Ruled:
    """A norm along axes: signs do not matter there."""
    label = call.label(call["self"])
    dims = as_list(call["dim"], len(label.axes))
    for k, axis in enumerate(label.axes):
        call.book.neutral(axis, signs=k not in dims)
    return reduced(call, label, dims)


@rule("amax", "amin", "max", "min", "any", "all", "prod", "var", "std", "var_mean", "std_mean",
      "_is_all_true", "_is_any_true", "logsumexp", "argmax", "argmin", "median", "nanmedian",
      "aminmax")  # fmt: skip
def general_reduction(call: Call) -> Ruled:
    """Any other function of a set of values; numbers of places know their axis."""
    if call["other"] is not None:
        from merge.tracing.rules.pointwise import general

        return general(call)
    label = call.label(call["self"])
    dims = as_list(call["dim"], len(label.axes))
    for axis in label.axes:
        call.book.neutral(axis)
    value = reduced(call, label, dims)
    values = label.axes[dims[0]] if len(dims) == 1 else None
    numbers = Label(value.axes, values, call.book.choice() if values else 0)
    if call.name in ("argmax", "argmin"):
        if call["dim"] is None:
            for axis in label.axes:
                call.book.freeze(axis, Reason("number", "numbered across axes"))
            return value
        return numbers
    if not isinstance(call.out, tuple | list):
        return value
    pairs = call.name in ("max", "min", "median", "nanmedian")
    return [value, numbers] if pairs else [value] * len(call.out)


def reduced(call: Call, label: Label, dims: list[int]) -> Label:
    """The label without some axes, or with axes of length 1 in their place."""
    keep = bool(call["keepdim"])
    axes = [() if k in dims else a for k, a in enumerate(label.axes) if keep or k not in dims]
    kept = [k for k in range(len(label.axes)) if keep or k not in dims]
    chosen = [
        Chosen(c.selection, c.values, tuple(kept.index(a) for a in c.axes))
        for c in label.chosen
        if not set(c.axes) & set(dims)
    ]
    return wrap(axes, chosen)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(call: Call) -> Ruled:
    """Every element depends on all along an axis, in the same way."""
    label = call.label(call["self"])
    for axis in label.axes:
        call.book.neutral(axis)
    without(call, label, [call["dim"] % len(label.axes)])
    return label


def without(call: Call, label: Label, dims: list[int]) -> None:
    """Enter that the elements along ``dims`` were taken together."""
    axes: list[Product] = [() if k in dims else a for k, a in enumerate(label.axes)]
    chosen = [c for c in label.chosen if not set(c.axes) & set(dims)]
    call.book.record(wrap(axes, chosen))


@rule("topk", "sort", "kthvalue", "mode")
def ranked(call: Call) -> Ruled:
    """Values by rank, which is a new axis, and numbers of places, which know their axis."""
    label = call.label(call["self"])
    dim = call["dim"] if call["dim"] is not None else -1
    dim %= max(1, len(label.axes))
    for axis in label.axes:
        call.book.neutral(axis)
    axes = list(label.axes)
    if call.name in ("topk", "sort"):
        axes[dim] = fresh(call.out[0].shape[dim], RANK)
    else:
        axes[dim : dim + 1] = [()] if call["keepdim"] else []
    numbers = Label(tuple(axes), label.axes[dim], call.book.choice())
    return [wrap(axes), numbers]


@rule("argsort")
def argsort(call: Call) -> Ruled:
    """The second half of sort."""
    label = call.label(call["self"])
    dim = (call["dim"] if call["dim"] is not None else -1) % len(label.axes)
    for axis in label.axes:
        call.book.neutral(axis)
    axes = list(label.axes)
    axes[dim] = fresh(call.shape[dim], RANK)
    return Label(tuple(axes), label.axes[dim], call.book.choice())
