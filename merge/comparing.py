"""Two models compared tensor by tensor, without either of them in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge import run
from merge.analysis.difference import Distance, Sums, by_layer, draw_distances, sums_of, total
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError
from merge.families.reconcile import reconcile
from merge.ir.checkpoint import Checkpoint, short
from merge.ir.expr import Apply, Expr
from merge.ir.side import Side
from merge.methods.core.schema import Method
from merge.plan.budget import BLOCK
from merge.plan.model import Chunk, Step

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Difference", "diff"]


@dataclass(frozen=True, slots=True)
class Difference:
    """How two models differ. layers, tensors: a row each; left_out: tensors and why."""

    first: str
    second: str
    base: str | None
    whole: Distance
    layers: tuple[Distance, ...]
    tensors: tuple[Distance, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self, *, tensors: bool = True) -> dict[str, Any]:
        """The same as plain data; what is not a number is null."""
        data = asdict(self) | {"notes": list(self.notes)}
        if not tensors:
            del data["tensors"]
        rows = [data["whole"], *data["layers"], *data.get("tensors", ())]
        for row in rows:
            row.update({k: None for k, v in row.items() if v != v})
        return data

    def plot(self, path: str | Path) -> Path:
        """Draw the layers into a .png, .svg or .pdf file; needs matplotlib."""
        return draw_distances(Path(path), self.layers, f"{self.first} and {self.second}")


def diff(
    first: object,
    second: object,
    *,
    base: object = None,
    memory: int | str | None = None,
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Difference:
    """How far apart two models are: distance, cosine and signs of each layer and tensor.

    first, second, base: anything `merge.open` takes; each tensor is read once, a piece at a time.
    With a base, cosine and signs are of the changes from it. Names, experts and ties are brought
    into those of the first model. What one of them lacks, what has another shape and what is no
    float is left out and named.
    """
    given = [first, second] if base is None else [first, second, base]
    opened = [open_checkpoint(g, allow_pickle=allow_pickle) for g in given]
    labels = [c.label for c in opened]
    alike = reconcile(opened)
    names, left_out = _common(alike)
    if not names:
        raise PlanError(
            "the models have no tensor in common",
            found=f"{labels[0]} and {labels[1]}",
            expected="tensors of the same names and shapes, of floats",
        )
    found = _compared(alike, names, memory, threads, progress)
    return Difference(
        labels[0],
        labels[1],
        labels[2] if len(labels) > 2 else None,
        Distance.of("all", list(found.values())),
        tuple(by_layer(found)),
        tuple(Distance.of(name, [sums]) for name, sums in found.items()),
        left_out,
        tuple(dict.fromkeys(n for c in alike for n in c.notes)),
    )


def _common(models: list[Checkpoint]) -> tuple[list[str], dict[str, str]]:
    """The tensors that can be compared, and why others cannot."""
    names: list[str] = []
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(n for c in models for n in c.tensors):
        lacking = [short(c.label) for c in models if name not in c.tensors]
        found = [c.tensors[name] for c in models if name in c.tensors]
        if any(name in c.tied for c in models if name in c.tensors) and not lacking:
            continue  # it is compared under the name that it shares
        if lacking:
            left_out[name] = f"not in {', '.join(lacking)}"
        elif len({e.shape for e in found}) > 1:
            left_out[name] = f"shapes {', '.join(str(list(e.shape)) for e in found)}"
        elif any(e.dtype.kind != "float" for e in found):
            left_out[name] = f"of {found[0].dtype.name}"
        else:
            names.append(name)
    return names, left_out


def _compared(
    models: list[Checkpoint],
    names: list[str],
    memory: int | str | None,
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> dict[str, Sums]:
    """The sums of each tensor, in the order of ``names``."""
    from merge.engine.execute import execute

    counted = _Counted()
    tensors: dict[str, Expr] = {}
    for name in names:
        method = _method(partial(counted.take, name))
        operands = tuple(c.tensors[name] for c in models)
        tensors[name] = Apply(method, operands, (), name, 0, len(operands))
    bare = replace(
        models[0],
        tensors=tensors,
        mass=1.0,
        tied={},
        side=Side(),
        dropped={},
        folders={},
        stems={},
        notes=(),
    )
    plan = run.plan(bare, run.PlanOptions(memory, threads, card=False))
    execute(plan, _Nowhere(), progress=progress, non_finite="allow")
    return {name: counted.sums(name) for name in names}


def _method(function: Callable[..., Tensor]) -> Method:
    return Method(
        name="diff",
        function=function,
        space="either",
        inputs=(2, 3),
        base="optional",
        local="element",
        measure=None,
        coefficients=False,
        statistics=False,
        injected=frozenset({"start"}),
        parameters={},
        symmetric=False,
        idempotent=False,
        random=False,
    )


class _Counted:
    """Sums of blocks by tensor and place: the same whatever the tiles and the threads are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tiles: dict[str, dict[int, Sums]] = {}

    def take(self, name: str, tensors: list[Tensor], *, start: int) -> Tensor:
        parts = {
            start + at: sums_of([t.reshape(-1)[at : at + BLOCK] for t in tensors])
            for at in range(0, tensors[0].numel(), BLOCK)
        }
        with self._lock:
            self._tiles.setdefault(name, {}).update(parts)
        return tensors[0]

    def sums(self, name: str) -> Sums:
        return total(self._tiles.get(name, {}).values())


class _Nowhere:
    """A sink that keeps nothing."""

    def finished(self, chunk: Chunk) -> bool:
        return False

    @contextmanager
    def open(self, step: Step, chunk: Chunk) -> Iterator[_Nowhere]:
        yield self

    def write(self, view: memoryview) -> None:
        """Nothing."""
