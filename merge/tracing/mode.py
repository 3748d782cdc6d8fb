"""The tracer: runs with a network and gives every tensor a label, operator by operator."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from merge.tracing.atoms import Reason, size_of
from merge.tracing.book import Book
from merge.tracing.labels import Label
from merge.tracing.refine import fresh
from merge.tracing.rules import rule_of
from merge.tracing.rules.registry import Call, wrap

__all__ = ["Tracer", "plain_operators"]

CONSTANT = Reason("constant", "a constant of the module")
_NUMBERS = ("index", "indices")
_VIEWS = ("transpose", "t", "squeeze", "unsqueeze", "swapaxes", "swapdims", "resize", "set")
"""Operators that in place change the shape, and no values."""


_DispatchMode = torch.utils._python_dispatch.TorchDispatchMode
"""torch documents the class under this name and has no other for it."""


class Tracer(_DispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that keeps a label for each tensor.

    ``unknown`` counts the calls of operators without a rule; what they touch is frozen. ``used``
    are the labels that some operator asked for.
    """

    def __init__(self, book: Book | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.single = False  # whether anything was computed in less than float64
        self.book = book or Book()
        self.unknown: dict[str, int] = {}
        self.used: set[Label] = set()
        self.calls = 0
        self._labels: dict[int, tuple[weakref.ref[Tensor], Label]] = {}
        self._places: dict[tuple[object, ...], Label] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The default wraps the mode for the compiler, whose import takes seconds."""
        return False

    # -- labels of tensors -----------------------------------------------------------------------
    def give(self, tensor: Tensor, label: Label) -> Label:
        """Give a tensor its label, and enter it."""
        label = self.book.record(label)
        self._labels[id(tensor)] = (weakref.ref(tensor), label)
        return label

    def own(self, tensor: Tensor, reason: Reason | None = None, parameter: bool = False) -> Label:
        """Give a tensor that outlives the trace axes of its own, frozen where there is a reason."""
        label = Label(tuple(fresh(n, reason) for n in tensor.shape), parameter=parameter)
        self._places[_place(tensor)] = label
        return self.give(tensor, label)

    def label(self, tensor: Tensor) -> Label:
        """The label of a tensor; one that came from nowhere is a constant."""
        found = self._labels.get(id(tensor))
        known = found[1] if found is not None and found[0]() is tensor else None
        known = known or self._places.get(_place(tensor))
        if known is not None:
            self.used.add(known)
            return known
        return self.give(
            tensor, Label(tuple(fresh(n, CONSTANT) for n in tensor.shape), literal=True)
        )

    def settle(self, tensor: Tensor) -> Label:
        """The label of a tensor that is used: what was pending is frozen."""
        label = self.label(tensor)
        for axis in label.pending:
            self.book.freeze(axis, Reason("number", "looked up by a mask"))
        return label

    # -- operators -------------------------------------------------------------------------------
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(func, args, kwargs or {}, out)
        return out

    def see(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Label what an operator returned, by its rule."""
        self.calls += 1
        schema = func._schema
        named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        named |= {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
        space, _, name = schema.name.partition("::")
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        call = Call(
            name, {a.name: named.get(a.name) for a in schema.arguments}, out, self.book, self.label
        )
        if not _tensors(call.arguments.values()) and not _tensors([out]):
            return
        for tensor in _tensors(call.arguments.values()):
            self.settle(tensor)
        ruled = self._ruled(call, rule_of(name) if space == "aten" else None)
        self._lost_numbers(call, ruled)
        ruled = self._may_be_written(call, ruled)
        for output, label in zip(_tensors([out]), ruled, strict=True):
            self.single |= output.dtype in (torch.float32, torch.float16, torch.bfloat16)
            held = self._labels.get(id(output))
            if held is not None and held[0]() is output and written and call.name not in _VIEWS:
                self._write(held[1], label)
            else:
                self.give(output, label)
        for name in written:
            target = call[name]
            if isinstance(target, Tensor) and len(ruled) == 1 and not _tensors([out]):
                self._write(self.label(target), ruled[0])

    def _may_be_written(self, call: Call, ruled: list[Label]) -> list[Label]:
        """Uniform tensors that share memory with what came out may be written to through it."""
        places = {t.untyped_storage().data_ptr() for t in _tensors([call.out])}
        for tensor in _tensors(call.arguments.values()):
            label = self.label(tensor)
            if label.uniform and tensor.untyped_storage().data_ptr() in places:
                own = replace(label, uniform=frozenset(), zero=False)
                self._labels[id(tensor)] = (weakref.ref(tensor), own)
                ruled = [replace(r, uniform=frozenset(), zero=False) for r in ruled]
        return ruled

    def _write(self, old: Label, new: Label) -> None:
        """A tensor in place of another: they are moved alike."""
        for one, other in zip(old.axes, new.axes, strict=True):
            self.book.same(one, other)
        if old.values is not None and old.values is not new.values:
            self.book.freeze(old.values, Reason("number", "numbers written over"))

    def _ruled(self, call: Call, rule: Callable[[Call], Any] | None) -> list[Label]:
        """A label for each tensor that came out; those without a rule are frozen."""
        outs = _tensors([call.out])
        found = rule(call) if rule else None
        labels = list(found) if isinstance(found, tuple | list) else [found]
        if not outs and rule:
            return []
        if len(labels) == len(outs) and all(
            label is None or _fits(label, out) for label, out in zip(labels, outs, strict=True)
        ):
            if all(label is not None for label in labels):
                return [label for label in labels if label is not None]
            if rule and len(labels) > 1:
                made = [
                    label or self._unlike(call, o) for label, o in zip(labels, outs, strict=True)
                ]
                return made
        return self._frozen(call, outs)

    def _unlike(self, call: Call, out: Tensor) -> Label:
        """A by-product that no rule says anything about; what uses it will be frozen."""
        reason = Reason("operator", f"a by-product of {call.name}")
        return wrap([fresh(n, reason) for n in out.shape])

    def _frozen(self, call: Call, outs: Sequence[Tensor]) -> list[Label]:
        reason = Reason("operator", f"the operator {call.name} has no rule")
        if outs:
            self.unknown[call.name] = self.unknown.get(call.name, 0) + 1
        touched = call.labels() if outs else []
        for label in touched:
            for axis in label.axes:
                self.book.freeze(axis, reason)
        return [wrap([fresh(n, reason) for n in out.shape]) for out in outs]

    def _lost_numbers(self, call: Call, ruled: Sequence[Label]) -> None:
        """Numbers of places that are calculated with freeze the axis that they number."""
        kept = [label.values for label in ruled]
        for name, value in call.arguments.items():
            for tensor in _tensors([value]):
                values = self.label(tensor).values
                read = name in _NUMBERS and rule_of(call.name) is not None
                if values is not None and not read and not any(k is values for k in kept):
                    reason = Reason("number", f"its numbers are calculated with in {call.name}")
                    self.book.freeze(values, reason)


def plain_operators() -> ExitStack:
    """A context in which torch takes attention and recurrent layers apart into plain operators.

    They run in one thread: the tensors are tiny, and threads would wait for one another.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    stack = ExitStack()
    fast = torch.backends.mha.get_fastpath_enabled()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stack.callback(torch.set_num_threads, threads)
    torch.backends.mha.set_fastpath_enabled(False)
    stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    stack.enter_context(torch.no_grad())
    return stack


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in values and lists of them, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def _fits(label: Label, out: Tensor) -> bool:
    return [size_of(a) for a in label.axes] == list(out.shape)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor lies in memory and how: another object for a parameter is still it."""
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), shape, stride, tensor.dtype
