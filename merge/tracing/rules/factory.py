"""Operators that make tensors out of nothing."""

from __future__ import annotations

from merge.tracing.atoms import Reason
from merge.tracing.labels import Label
from merge.tracing.refine import fresh
from merge.tracing.rules.registry import Call, Ruled, rule

__all__: list[str] = []


@rule("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided",
      "new_empty_strided", "zero", "_efficientzerotensor", "empty_permuted")  # fmt: skip
def zeros(call: Call) -> Ruled:
    """Zero stays zero, whatever is done to it."""
    axes = tuple(fresh(n) for n in call.shape)
    if "empty" in call.name:
        return Label(axes)
    return Label(axes, uniform=frozenset(range(len(axes))), zero=True)


@rule("ones", "ones_like", "new_ones", "full", "full_like", "new_full", "scalar_tensor")
def full(call: Call) -> Ruled:
    """The same value everywhere: coordinates may be exchanged."""
    axes = tuple(fresh(n) for n in call.shape)
    for axis in axes:
        call.book.neutral(axis)
    return Label(axes, uniform=frozenset(range(len(axes))))


@rule("arange", "linspace", "logspace", "eye", "randn", "rand", "randint", "normal", "uniform",
      "bernoulli", "randperm", "tril_indices", "triu_indices", "range", "exponential",
      "rand_like", "randn_like", "multinomial", "hann_window")  # fmt: skip
def constant(call: Call) -> Ruled:
    """Values of its own for each place."""
    reason = Reason("constant", f"a constant made by {call.name}")
    for label in call.labels():
        for axis in label.axes:
            call.book.freeze(axis, reason)
    return Label(tuple(fresh(n, reason) for n in call.shape))
