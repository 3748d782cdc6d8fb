"""Evaluate one step's expression, a tile at a time, after its methods have been measured."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from merge.engine.derive import copied, derive, parts_of
from merge.engine.finite import Policy, check_finite
from merge.engine.reorder import reordered
from merge.engine.stage import Stage, bytes_of, torch_dtype
from merge.errors import MergeError, SourceError
from merge.ir.derived import Concat, LowRank, Reorder, Window
from merge.ir.expr import Apply, Expr, Linear, Read, Same, TensorReader, reads, walk
from merge.methods.core.masks import Stream
from merge.methods.core.shapes import row_length
from merge.plan.keep import nearest_applies
from merge.plan.model import Step
from merge.plan.simplify import simplify

__all__ = ["Evaluator", "Rules", "Stopped", "Task"]


class Stopped(Exception):
    """The run was stopped, by another worker's error or an interrupt; the tile is left."""


@dataclass(slots=True)
class Task:
    """A step on its way, with what its measuring pass has found out."""

    step: Step
    measured: dict[int, Any] = field(default_factory=dict)  # by the id of the `Apply` node
    kept: dict[int, Tensor] = field(default_factory=dict)  # whole intermediates, by the node's id
    held: dict[int, Tensor] = field(default_factory=dict)  # small operands, by the node's id
    seen: set[int] = field(default_factory=set)  # ids of reads of which all was checked


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for all tasks.

    spare: bytes that one measuring pass may hold between tiles. keep: bytes of intermediates. open:
    opens an input.
    """

    tile: int
    spare: int
    keep: int
    policy: Policy
    stopped: Callable[[], bool]
    open: Callable[[Read], AbstractContextManager[TensorReader]]


class Evaluator:
    """Computes tiles of one task. A context: inputs are open while it is entered."""

    def __init__(self, task: Task, stage: Stage, rules: Rules) -> None:
        self.task = task
        self.stage = stage
        self.rules = rules
        self.expr = task.step.expr
        self.numel = task.step.output.numel
        self.tile = rules.tile if task.step.grain == 1 else task.step.chunk
        self.compute = torch.float64 if self.expr.dtype.name == "float64" else torch.float32
        self.copied = copied(self.expr, task.step.output.dtype)
        self._open = ExitStack()
        self._readers: dict[int, TensorReader] = {}  # by the node's id, as all below
        # of this tile, by node and span
        self._memo: ChainMap[tuple[int, int, int], Tensor] = ChainMap()

    def __enter__(self) -> Evaluator:
        with self._open:
            for read in self.task.step.reads:
                reader = self._open.enter_context(self.rules.open(read))
                self._readers[id(read)] = reader
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # -- one tile ----------------------------------------------------------------------------
    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """``start`` to ``stop`` in tiles."""
        for at in range(start, stop, self.tile):
            yield at, min(at + self.tile, stop)

    def finished(self, start: int, stop: int) -> Tensor:
        """Elements of the output as they are stored, in host memory, valid until the next call."""
        self._begin()
        expr, spec = self.expr, self.task.step.output
        if isinstance(expr, Same):
            return self._same(expr, start, stop)
        if self.copied:
            out = self._stored(expr, start, stop)
            if expr.dtype.kind == "float":
                check_finite(
                    out, self.rules.policy, start, expr if isinstance(expr, Read) else spec
                )
            return out
        result = self._value(expr, start, stop)
        out = self.stage.host(result, spec.dtype)
        check_finite(out, self.rules.policy, start, spec, result)
        return out

    def _begin(self) -> None:
        if self.rules.stopped():
            raise Stopped
        self._memo.clear()
        self.stage.begin_tile()

    def _stored(self, expr: Expr, start: int, stop: int) -> Tensor:
        """Elements as they are stored, of a tensor or of parts of tensors, in host memory."""
        if isinstance(expr, Read):
            return self.stage.raw(self._readers[id(expr)], expr.dtype, start, stop)
        if isinstance(expr, Window):
            return self._stored(expr.operands[0], expr.start + start, expr.start + stop)
        if isinstance(expr, Reorder):
            dtype, (operand,) = torch_dtype(expr.dtype), expr.operands
            return reordered(
                expr,
                start,
                stop,
                lambda numel: self.stage.take_host(numel, dtype),
                lambda at, out: self._stored_into(operand, at, out),
            )
        assert isinstance(expr, Concat)
        parts = [self._stored(e, a, b) for e, a, b in parts_of(expr, start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stored_into(self, expr: Expr, start: int, out: Tensor) -> None:
        """Fill ``out`` with elements as they are stored, from ``start`` on; hold nothing."""
        if isinstance(expr, Read):
            self._readers[id(expr)].read_into(start * expr.dtype.itemsize, bytes_of(out))
            return
        with self.stage.scope():
            out.copy_(self._stored(expr, start, start + out.numel()))

    def _value(self, expr: Expr, start: int, stop: int) -> Tensor:
        """``expr`` on a tile in the compute type; one evaluation for each node."""
        key = (id(expr), start, stop)
        if (known := self._memo.get(key)) is not None:
            return known
        if (kept := self.task.kept.get(id(expr))) is not None:
            return kept[start:stop]
        value = self._memo[key] = self._evaluate(expr, start, stop)
        return value

    def _evaluate(self, expr: Expr, start: int, stop: int) -> Tensor:
        if isinstance(expr, Read):
            reader = self._readers[id(expr)]
            tile = self.stage.load(reader, expr.dtype, start, stop, self.compute)
            if id(expr) not in self.task.seen:
                check_finite(tile, self.rules.policy, start, expr)
            return tile
        if isinstance(expr, Linear):
            return self._linear(expr.terms, start, stop)
        if isinstance(expr, Apply):
            return self._apply(expr, start, stop)
        if isinstance(expr, Reorder) and isinstance(expr.operands[0], Read):
            return self._moved(expr, expr.operands[0], start, stop)
        assert not isinstance(expr, Same), "data that is not arithmetic is never an operand"
        return derive(self, expr, start, stop)

    def _moved(self, expr: Reorder, read: Read, start: int, stop: int) -> Tensor:
        """A stored tensor in a new order: its bytes are moved, then widened in one go."""
        tile = self.take(stop - start)
        with self.stage.scope():
            tile.copy_(self._stored(expr, start, stop))
        check_finite(tile, self.rules.policy, start, read)
        return tile

    # -- what `merge.engine.derive` computes its nodes from --------------------------------------
    def take(self, numel: int) -> Tensor:
        """A buffer in the compute type, valid until the next tile."""
        return self.stage.take(numel, self.compute)

    def value(self, expr: Expr, start: int, stop: int) -> Tensor:
        """Elements of an expression in the compute type, valid until the next tile."""
        return self._value(expr, start, stop)

    def into(self, expr: Expr, start: int, stop: int, out: Tensor) -> None:
        """Copy elements of an expression into ``out``; the buffers it took are free again."""
        outer, self._memo = self._memo, ChainMap({}, *self._memo.maps)
        with self.stage.scope():
            out.copy_(self._value(expr, start, stop))
        self._memo = outer

    def held(self, expr: Expr) -> Tensor:
        """All of a small tensor in the compute type, kept as long as the task is worked on."""
        if (known := self.task.held.get(id(expr))) is None:
            known = self.task.held[id(expr)] = self.whole(expr).to(self.compute, copy=True)
        return known

    def whole(self, expr: Expr) -> Tensor:
        """All of a tensor in its shape: floats in the compute type, others as they are stored."""
        numel = math.prod(expr.shape)
        found = (
            self._value(expr, 0, numel)
            if expr.dtype.kind == "float"
            else self.stage.moved(self._stored(expr, 0, numel))
        )
        return found.view(expr.shape)

    def _apply(self, node: Apply, start: int, stop: int) -> Tensor:
        numel = math.prod(node.shape)
        if node.method.local == "tensor" and stop - start < numel:
            return self._value(node, 0, numel)[start:stop]
        models, statistics = (
            [self._operand(node, e, start, stop) for e in group]
            for group in (node.operands[: node.models], node.operands[node.models :])
        )
        measured = self.task.measured.get(id(node))
        wanted = _injected(node, measured=measured, start=start, draw=_draw(node))
        groups = (models, statistics) if node.method.statistics else (models,)
        result: Tensor = node.method.function(*groups, **node.arguments, **wanted)
        return result.reshape(-1)

    def _linear(self, terms: tuple[tuple[float, Expr], ...], start: int, stop: int) -> Tensor:
        products = any(isinstance(e, LowRank) for _, e in terms)  # these are no weights
        if len(terms) > 1 and not products and abs(math.fsum(c for c, _ in terms) - 1.0) < 1e-9:
            return self._affine(terms, start, stop)
        out = self.stage.take(stop - start, self.compute)
        (first, operand), rest = terms[0], terms[1:]
        value = self._value(operand, start, stop)
        if first == 1.0 and rest:  # a difference, or a base plus something: one operation less
            (second, other), rest = rest[0], rest[1:]
            torch.add(value, self._value(other, start, stop), alpha=second, out=out)
        else:
            torch.mul(value, first, out=out)
        for coefficient, other in rest:
            out.add_(self._value(other, start, stop), alpha=coefficient)
        return out

    def _affine(self, terms: tuple[tuple[float, Expr], ...], start: int, stop: int) -> Tensor:
        """A sum whose coefficients add up to 1, as x_p + sum_i c_i (x_i - x_p).

        Fine-tunes lie close to one another, so the differences are nearly exact and only the last
        addition rounds at the size of the weights: half the error of the plain sum. x_p is the
        operand of largest coefficient.
        """
        pivot = max(range(len(terms)), key=lambda i: terms[i][0])
        origin = self._value(terms[pivot][1], start, stop)
        out = self.stage.take(stop - start, self.compute)
        difference = self.stage.take(stop - start, self.compute)
        rest = [term for i, term in enumerate(terms) if i != pivot]
        for i, (coefficient, operand) in enumerate(rest):
            torch.sub(self._value(operand, start, stop), origin, out=difference)
            if i == 0:
                torch.mul(difference, coefficient, out=out)
            else:
                out.add_(difference, alpha=coefficient)
        return out.add_(origin)

    def _operand(self, node: Apply, expr: Expr, start: int, stop: int) -> Tensor:
        """A tile of an operand as the method sees it; all of one in a shape of its own."""
        if expr.shape != node.shape and node.method.statistic is not None:
            return self.whole(expr)
        return self._shaped(node, self._value(expr, start, stop))

    def _shaped(self, node: Apply, flat: Tensor) -> Tensor:
        """A tile as the node's method sees it: flat, as rows, or as the whole tensor."""
        if node.method.local == "tensor":
            return flat.view(node.shape)
        row = max(1, row_length(node.shape))
        return flat.view(-1, row) if node.method.local == "row" else flat

    def _same(self, expr: Same, start: int, stop: int) -> Tensor:
        first, *others = expr.operands
        out = self._stored(first, start, stop)
        for other in others:
            tile = self._stored(other, start, stop)
            if not torch.equal(out.view(torch.uint8), tile.view(torch.uint8)):
                names = [reads(e)[0].source.identity for e in (first, other)]
                raise SourceError(
                    "a tensor of whole numbers differs between the models, and cannot be averaged",
                    tensor=self.task.step.output.name,
                    found=f"{' and '.join(names)} differ",
                    expected="equal values in all models",
                )
        return out

    # -- the measuring pass --------------------------------------------------------------------
    def measure(self) -> None:
        """Let the task's methods measure whole tensors, inner ones first.

        Linear combinations are resolved into plain sums in the task's step; what the other methods
        measured is kept in the task.
        """
        while (node := self._unmeasured()) is not None:
            try:
                if self.task.step.kept_bytes <= self.rules.keep:
                    self._keep(node)
                value = node.method.measure(_Tiles(self, node), **node.arguments)  # type: ignore[misc]
                if node.method.coefficients:
                    wanted = _injected(node, measured=value)
                    coefficients = node.method.function(**node.arguments, **wanted)
                    self.expr = simplify(self.expr, {id(node): coefficients})
                else:
                    self.task.measured[id(node)] = value
            except MergeError as error:
                raise error.at(tensor=self.task.step.output.name) from None
        self.task.step = replace(self.task.step, expr=self.expr, reads=reads(self.expr))

    def _keep(self, node: Apply) -> None:
        """Compute the intermediates under ``node`` now, so that its walks find them."""
        for inner in nearest_applies(node):
            if id(inner) in self.task.kept:
                continue
            whole: Tensor | None = None
            for start, stop in self.spans(0, math.prod(inner.shape)):
                self._begin()
                value = self._value(inner, start, stop)
                if whole is None:
                    whole = torch.empty(
                        math.prod(inner.shape), dtype=value.dtype, device=value.device
                    )
                whole[start:stop] = value
            if whole is not None:
                self.task.kept[id(inner)] = whole

    def _unmeasured(self) -> Apply | None:
        measures = (n for n in walk(self.expr) if isinstance(n, Apply) and n.method.measure)
        return next((n for n in measures if id(n) not in self.task.measured), None)

    def operands(self, node: Apply, start: int, stop: int) -> list[Tensor]:
        """The operands of one method on a tile."""
        self._begin()
        return [self._shaped(node, self._value(e, start, stop)) for e in node.operands]


class _Tiles:
    """One method's operands, tile by tile: see `merge.methods.core.measure.Tiles`."""

    def __init__(self, evaluator: Evaluator, node: Apply) -> None:
        self._evaluator = evaluator
        self._node = node
        self.numel = math.prod(node.shape)
        self.count = len(node.operands)
        self.grain = evaluator.task.step.grain
        self.allowance = evaluator.rules.spare
        self.draw = _draw(node)

    def __call__(
        self, spans: Iterable[tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        whole = self._evaluator.spans(0, self.numel)
        for start, stop in whole if spans is None else spans:
            yield start, self._evaluator.operands(self._node, start, stop)
        if spans is None:
            self._evaluator.task.seen.update(id(read) for read in reads(self._node))


def _injected(node: Apply, **known: Any) -> dict[str, Any]:
    """Those of the engine's keywords that the node's function takes."""
    given = {"count": node.models, **known}
    return {k: v for k, v in given.items() if k in node.method.injected}


def _draw(node: Apply) -> Stream:
    return Stream(node.seed, node.method.name, node.tensor)
