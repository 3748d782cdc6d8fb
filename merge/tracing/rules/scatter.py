"""Operators that put values at places by number, and those that count places."""

from __future__ import annotations

from torch import Tensor

from merge.tracing.atoms import Reason, size_of
from merge.tracing.refine import fresh
from merge.tracing.rules.index import BY_NUMBER, freeze_values, indexed, look_up
from merge.tracing.rules.pointwise import aligned
from merge.tracing.rules.registry import Call, Ruled, rule, wrap

__all__: list[str] = []


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill")
def scatter(call: Call) -> Ruled:
    """Values put at the places that an index names along one axis."""
    label, numbers = call.label(call["self"]), call.label(call["index"])
    dim = call["dim"] % max(1, len(label.axes))
    look_up(call, label.axes[dim], numbers)
    flat = call.name.startswith("index")
    source = call["src"] if call["src"] is not None else call["source"]
    others = [numbers] if not flat else []
    others += [call.label(source)] if isinstance(source, Tensor) else []
    for other in others:
        for k, (axis, own) in enumerate(zip(label.axes, other.axes, strict=False)):
            if k != dim and axis and own:
                if flat:
                    call.book.same(axis, own)
                else:
                    call.book.match(axis, own)
                    call.book.neutral(axis)
                    call.book.neutral(own)
    for k, axis in enumerate(label.axes):
        if k == dim or call.name == "index_fill":
            call.book.neutral(axis)
    return label


@rule("index_put", "_index_put_impl")
def index_put(call: Call) -> Ruled:
    """Values put at places named along several axes; what stands before these is frozen."""
    label, values = call.label(call["self"]), call.label(call["values"])
    given = [(k, i) for k, i in enumerate(call["indices"]) if isinstance(i, Tensor)]
    dims = indexed(given)
    single = len(given) == len(dims) == 1
    for k in dims:
        look_up(call, label.axes[k], call.label(given[0][1]) if single else wrap([]))
    for _, i in () if single else given:
        freeze_values(call, call.label(i))
    behind = list(label.axes[dims[-1] + 1 :])
    for axis in label.axes[: dims[-1]]:
        call.book.freeze(axis, BY_NUMBER)
    own = values.axes[max(0, len(values.axes) - len(behind)) :]
    for axis in values.axes[: len(values.axes) - len(own)]:
        call.book.freeze(axis, BY_NUMBER)
    for one, other in aligned([wrap(behind), wrap(own)], len(behind)):
        if one and other:
            call.book.same(one, other)
        elif one:
            call.book.neutral(one)
    return label


@rule("masked_scatter")
def masked_scatter(call: Call) -> Ruled:
    """Rows in place of those that a mask names, where the mask is the same along the last axes."""
    label, source = call.label(call["self"]), call.label(call["source"])
    mask, count = call["mask"], 0
    for ours, theirs in zip(reversed(label.axes), reversed(source.axes), strict=False):
        axis = mask.ndim - 1 - count
        alike = axis >= 0 and (mask.shape[axis] == 1 or mask.stride(axis) == 0)
        if not alike or size_of(ours) != size_of(theirs):
            break
        call.book.same(ours, theirs)
        count += 1
    for other in (label, source):
        for axis in other.axes[: len(other.axes) - count]:
            call.book.freeze(axis, BY_NUMBER)
    return label


@rule("nonzero", "bincount", "histc", "_unique2", "unique_consecutive", "searchsorted",
      "bucketize", "masked_select", "unique_dim")  # fmt: skip
def counted(call: Call) -> Ruled:
    """Places come out as numbers: the axes are frozen."""
    reason = Reason("number", f"numbered by {call.name}")
    for label in call.labels():
        for axis in label.axes:
            call.book.freeze(axis, reason)
        freeze_values(call, label)
    outs = call.out if isinstance(call.out, tuple | list) else [call.out]
    made = [wrap([fresh(n, reason) for n in o.shape]) for o in outs]
    return made if isinstance(call.out, tuple | list) else made[0]
