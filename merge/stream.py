"""The values of a checkpoint without a place to keep them: tensor by tensor, or sums alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from merge import run
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import window
from merge.ir.expr import Read
from merge.ir.side import Side
from merge.run import PlanOptions

if TYPE_CHECKING:
    import torch

__all__ = ["TensorsOf", "squares", "tensors"]


class TensorsOf:
    """A checkpoint's tensors, one at a time: read as stored, or computed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The tensor ``name``, or its rows from ``first`` on and before ``last``."""
        import torch

        from merge.engine.stage import bytes_of, torch_dtype

        expr = self._checkpoint.tensors[name]
        shape = expr.shape if last is None else (last - first, *expr.shape[1:])
        start = first * math.prod(expr.shape[1:])
        if isinstance(expr, Read):
            found = torch.empty(shape, dtype=torch_dtype(expr.dtype))
            with expr.source.open(expr.spec.name) as reader:
                reader.read_into(start * expr.dtype.itemsize, bytes_of(found))
            return found
        part = Checkpoint({name: window(expr, start, shape)}, self._checkpoint.label)
        return run.state_dict(part)[name]


def tensors(checkpoint: Checkpoint, options: PlanOptions) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor with its name, computed when it is asked for: one is in memory at a time.

    The buffers besides it are bounded. Tied names come once, under the first.
    """
    from merge.engine.execute import execute
    from merge.write.memory import MemorySink

    for name, expr in checkpoint.tensors.items():
        if name in checkpoint.tied:
            continue
        alone = replace(_bare(checkpoint), tensors={name: expr})
        plan = run.plan(alone, replace(options, card=False))
        sink = MemorySink(plan)
        execute(plan, sink)
        yield name, sink.tensors[name]


def squares(checkpoint: Checkpoint, options: PlanOptions) -> dict[str, float]:
    """The sum of squares of each tensor, in float64 over values in float32 or wider."""
    from merge.engine.execute import execute
    from merge.write.sums import SquaresSink

    if not checkpoint.tensors:
        return {}
    wide = any(e.dtype.name == "float64" for e in checkpoint.tensors.values())
    bare = _bare(checkpoint).cast("float64" if wide else "float32")
    plan = run.plan(bare, replace(options, card=False))
    sink = SquaresSink(plan)
    execute(plan, sink)
    return sink.squares


def _bare(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors without side files."""
    tied = dict(checkpoint.tied)
    kept = {n: e for n, e in checkpoint.tensors.items() if n not in tied}
    return replace(checkpoint, tensors=kept, tied={}, side=Side(), dropped={}, folders={}, stems={})
