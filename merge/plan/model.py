"""The plan: everything a merge will do, as plain data, complete before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from merge.ir.derived import BlockScaled, Cast, Concat, Gather, LowRank, Reorder, Window
from merge.ir.expr import Apply, Expr, InputFile, Linear, Read, Same
from merge.ir.spec import TensorSpec

__all__ = [
    "Budget",
    "Chunk",
    "OutputFile",
    "Plan",
    "SideOutput",
    "Step",
    "human_bytes",
    "side_output",
]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of one output tensor's elements: the unit of work, of proof and of resumption."""

    step: int
    number: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor: how it is computed and where its bytes go."""

    output: TensorSpec
    expr: Expr
    reads: tuple[Read, ...]  # the distinct tensors that the expression reads
    file: str
    offset: int  # of the tensor's first byte in the file
    chunk: int  # elements of a chunk; the last one may be shorter
    grain: int  # a tile is a multiple of so many elements: 1, a row, an expert, or the tensor
    passes: int  # how often the inputs are read
    kept_bytes: int  # of intermediates that would otherwise be computed in every pass
    held_bytes: int  # of small operands that are kept whole, such as low-rank factors
    tile_bytes: int  # of buffers that a worker holds per element of a tile, at most

    def chunks(self, number: int) -> Iterator[Chunk]:
        """The chunks of this step, which is the plan's ``number``-th."""
        for n, start in enumerate(range(0, self.output.numel, self.chunk)):
            yield Chunk(number, n, start, min(start + self.chunk, self.output.numel))

    @property
    def read_bytes(self) -> int:
        """Bytes of distinct input read in one pass."""
        return sum(r.spec.nbytes for r in self.reads)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A weight file to write: its finished header, then the tensors' bytes."""

    name: str
    header: bytes
    size: int
    tensors: int


@dataclass(frozen=True, slots=True)
class SideOutput:
    """A small file of the output: copied from ``path``, or written from ``text`` or ``data``."""

    name: str
    path: str | None = None
    text: str | None = None
    data: bytes | None = field(default=None, repr=False)
    stamp: str = ""  # size and time of ``path`` when it was planned
    fetch: Callable[[], str] | None = None  # of a file elsewhere: brings it here, and says where

    def local(self) -> str | None:
        """Where the file to copy lies on this machine; fetched where it lies elsewhere."""
        return self.path if self.fetch is None else self.fetch()


def side_output(name: str, content: str | bytes) -> SideOutput:
    """A small file of the output with this content."""
    if isinstance(content, bytes):
        return SideOutput(name, data=content)
    return SideOutput(name, text=content)


@dataclass(frozen=True, slots=True)
class Budget:
    """How the work is cut to fit ``memory`` bytes.

    tile: elements. buffers: bytes that all workers may hold together. measure: bytes of those that
    one worker's measuring pass may hold between tiles. keep: bytes of those for intermediates of
    one tensor; what needs more is computed in every pass. ahead: bytes of those for inputs that are
    fetched from far away, ahead of their use.
    """

    tile: int
    workers: int
    memory: int
    buffers: int
    measure: int
    keep: int
    device: str
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be read, computed and written. ``hash`` stands for every byte of the output."""

    label: str
    steps: tuple[Step, ...]
    files: tuple[OutputFile, ...]
    side: tuple[SideOutput, ...]
    inputs: tuple[InputFile, ...]
    roots: tuple[str, ...]  # folders and files of the inputs, which the output must not touch
    tied: tuple[tuple[str, str], ...]
    budget: Budget
    notes: tuple[str, ...]
    hash: str
    held_file: int = 0  # bytes of the one weight file that is in memory until it is sent away

    @property
    def input_bytes(self) -> int:
        """Bytes of distinct input tensors."""
        distinct = dict.fromkeys(r for s in self.steps for r in s.reads)
        return sum(r.spec.nbytes for r in distinct)

    @property
    def read_bytes(self) -> int:
        """Bytes that will be read, measuring passes counted."""
        return sum(s.read_bytes * s.passes for s in self.steps)

    @property
    def write_bytes(self) -> int:
        """Bytes of weight files that will be written."""
        return sum(f.size for f in self.files)

    def part(self, file: str) -> Plan:
        """The part of the plan that makes one of its weight files, whose steps count from 0."""
        return replace(
            self,
            steps=tuple(s for s in self.steps if s.file == file),
            files=tuple(f for f in self.files if f.name == file),
        )

    def to_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """The plan as JSON data; with ``tensors``, every output tensor and its formula."""
        copies = sum(isinstance(s.expr, Read) for s in self.steps)
        data: dict[str, Any] = {
            "plan": self.hash,
            "what": self.label,
            "tensors": len(self.steps),
            "copied_tensors": copies,
            "parameters": sum(s.output.numel for s in self.steps),
            "input_bytes": self.input_bytes,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "buffer_bytes": self.budget.buffers,
            "held_file_bytes": self.held_file,
            "workers": self.budget.workers,
            "tile_elements": self.budget.tile,
            "device": self.budget.device,
            "inputs": [{"file": f.path, "bytes": f.size} for f in self.inputs],
            "outputs": [
                {"file": f.name, "bytes": f.size, "tensors": f.tensors} for f in self.files
            ],
            "side_files": [s.name for s in self.side],
            "notes": list(self.notes),
        }
        if tensors:
            names = source_names(self.steps)
            data["sources"] = {v: k for k, v in names.items()}
            data["steps"] = [
                {
                    "tensor": s.output.name,
                    "dtype": s.output.dtype.name,
                    "shape": list(s.output.shape),
                    "file": s.file,
                    "offset": s.offset,
                    "formula": formula(s.expr, names),
                }
                for s in self.steps
            ]
        return data

    def __str__(self) -> str:
        d = self.to_json()
        lines = [
            f"{self.label}",
            f"  {d['tensors']} tensors, {d['parameters']:,} parameters"
            f" ({d['copied_tensors']} copied as they are)",
            f"  reads   {human_bytes(self.read_bytes):>10}  from {len(self.inputs)} files"
            + (
                f", each byte {self.read_bytes / self.input_bytes:.2f} times" if self.inputs else ""
            ),
            f"  writes  {human_bytes(self.write_bytes):>10}  to {len(self.files)} files"
            f" and {len(self.side)} side files",
            f"  holds   {human_bytes(self.budget.buffers):>10}  of buffers at most:"
            f" {self.budget.workers} workers on {self.budget.device},"
            f" tiles of {self.budget.tile:,} elements",
        ]
        if self.held_file:
            lines.append(
                f"  and     {human_bytes(self.held_file):>10}  of one weight file at a time,"
                " until it is sent"
            )
        return "\n".join(
            lines + [f"  note: {n}" for n in self.notes] + [f"  plan {self.hash[:16]}"]
        )


def human_bytes(n: float) -> str:
    """Bytes for people, in binary units: ``2.06 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} TiB"


def source_names(steps: Iterable[Step]) -> dict[str, str]:
    """Short names, A, B, ..., for the sources in order of first use."""
    found = dict.fromkeys(r.source.identity for s in steps for r in s.reads)
    return {identity: _letters(i) for i, identity in enumerate(found)}


def _letters(i: int) -> str:
    return (_letters(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def formula(expr: Expr, names: dict[str, str]) -> str:
    """``expr`` as text; equal texts mean equal values."""
    if isinstance(expr, Read):
        return f"{names[expr.source.identity]}[{expr.spec.name}]"
    if isinstance(expr, Linear):
        return " + ".join(f"{c!r}*{formula(e, names)}" for c, e in expr.terms)
    inner = ", ".join(formula(e, names) for e in expr.operands)
    if isinstance(expr, Same):
        return f"same({inner})"
    if isinstance(expr, Apply):
        parameters = json.dumps(dict(expr.parameters))
        return f"{expr.method.name}({inner}; {parameters}, {expr.tensor!r}, seed {expr.seed})"
    if isinstance(expr, Cast):
        return f"cast({inner} as {expr.dtype.name})"
    shape = "x".join(map(str, expr.shape))
    if isinstance(expr, Window):
        return f"{inner}[from {expr.start} as {shape}]"
    if isinstance(expr, Concat):
        return f"concat({inner} as {shape})"
    if isinstance(expr, Gather):
        return f"rows({inner}; table {expr.table.digest} as {shape})"
    if isinstance(expr, Reorder):
        orders = (f"axis {i} by {o.digest}" for i, o in enumerate(expr.axes) if o is not None)
        return f"reordered({inner}; {', '.join(orders)})"
    if isinstance(expr, LowRank):
        return f"lowrank({inner}; rank {expr.rank}{', transposed' * expr.transposed} as {shape})"
    if isinstance(expr, BlockScaled):
        return f"scaled({inner}; blocks of {expr.block[0]}x{expr.block[1]})"
    return f"{expr.name}({inner}; {json.dumps(dict(expr.parameters))})"
