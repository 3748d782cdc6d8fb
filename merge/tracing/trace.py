"""One run of a module under the tracer: labels of its parameters, inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from merge.tracing.atoms import Reason
from merge.tracing.book import Book
from merge.tracing.labels import Label
from merge.tracing.mode import Tracer, plain_operators
from merge.tracing.precision import double_precision

__all__ = ["Pick", "Traced", "all_of", "state_of", "tensors_in", "trace"]

Pick: TypeAlias = Callable[[Any], Any]


def all_of(output: Any) -> Any:
    """All that a module returns is its output."""
    return output


@dataclass(frozen=True, slots=True)
class Traced:
    """What a trace found: labels by the names of the state dict, and of the outputs.

    ``unknown`` counts the calls of operators without a rule, ``calls`` all calls. ``single`` tells
    whether the module computed something in less than the float64 of its weights.
    """

    book: Book
    state: Mapping[str, Label]
    outputs: Mapping[str, Label]
    unknown: Mapping[str, int]
    calls: int
    single: bool


def trace(
    module: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    free_outputs: bool = False,
    pick: Pick = all_of,
) -> Traced:
    """Run the module once and label all that it computes.

    Inputs and constants are frozen. So are outputs, unless ``free_outputs`` is set: then the result
    says which groups index them. ``pick`` takes from what the module returns what counts as output.
    """
    tracer = Tracer()
    state = state_of(module)
    kept = {id(t) for t in state.values()}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) in kept and tensor.is_floating_point():
            tracer.own(tensor, parameter=True)
        else:
            tracer.own(tensor, Reason("constant", f"the buffer {name.rpartition('.')[2]}"))
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    for name, tensor in tensors_in(kwargs or args, "input"):
        tracer.own(tensor, Reason("input", f"an axis of {name}"))
    with plain_operators(), double_precision(), tracer:
        out = module(*args, **kwargs)
    outputs: dict[str, Label] = {}
    for name, tensor in tensors_in(pick(out), "output"):
        label = outputs[name] = tracer.settle(tensor)
        if not free_outputs:
            for axis in label.axes:
                tracer.book.freeze(axis, Reason("output", f"an axis of {name}"))
            if label.values is not None:
                tracer.book.freeze(label.values, Reason("output", f"numbered in {name}"))
    used = set(tracer.used)
    labels = {name: tracer.label(tensor) for name, tensor in state.items()}
    for label in labels.values():
        for axis in label.axes if label not in used else ():
            tracer.book.freeze(axis, Reason("unused", "not used in the run that was traced"))
    return Traced(tracer.book, labels, outputs, tracer.unknown, tracer.calls, tracer.single)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, under all their names; the tensors themselves."""
    return {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists, mappings and objects, with the way to them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors_in(inner, f"{name} {key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from tensors_in(inner, f"{name} {number}")
