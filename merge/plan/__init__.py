"""Passes over the IR, each a small pure function: check, simplify, lay out, schedule."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Iterable

from merge.ir.checkpoint import SPACE_KEY, Checkpoint
from merge.ir.dtypes import DType
from merge.ir.expr import Apply, Expr, InputFile, Location, Read, walk
from merge.ir.spec import TensorSpec
from merge.plan.budget import budget, extent, held_bytes, parse_bytes, tile_bytes
from merge.plan.check import check, notes
from merge.plan.far import far_notes
from merge.plan.keep import keep_notes, kept_bytes
from merge.plan.layout import PT, lay_out, lay_out_side
from merge.plan.model import Plan, SideOutput, Step, formula, source_names
from merge.plan.simplify import simplify

__all__ = ["make_plan", "parse_bytes"]

FORMAT = 1
"""Raised when the bytes that a plan stands for change, so that old partial work is not resumed."""


def make_plan(
    checkpoint: Checkpoint,
    *,
    memory: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    shard_size: int = 5_000_000_000,
    extra: Iterable[SideOutput] = (),
    in_memory: bool = False,
) -> Plan:
    """The plan to compute ``checkpoint``; PlanError when something does not fit.

    memory: bytes of buffers. threads: workers. shard_size: bytes of a weight file. extra: further
    small files of the output. in_memory: weight files are held in memory, one at a time, until they
    are sent away; then ``memory`` bounds buffers and file together.
    """
    check(checkpoint)
    tensors = {
        name: simplify(expr)
        for name, expr in checkpoint.tensors.items()
        if name not in checkpoint.tied
    }
    specs = [
        TensorSpec(name, e.dtype, e.shape, checkpoint.folders.get(name, "")).cast(
            checkpoint.out_dtype
        )
        for name, e in tensors.items()
    ]
    metadata = PT if checkpoint.space == "weight" else {**PT, SPACE_KEY: checkpoint.space}
    files, places, indices = lay_out(specs, shard_size, metadata, checkpoint.stems)
    steps = [_step(spec, tensors[spec.name], places[spec.name]) for spec in specs]
    steps.sort(key=_disk_order)
    side = [
        *lay_out_side(checkpoint.side, checkpoint.out_dtype, _main_dtypes(steps)),
        *indices,
        *extra,
    ]
    inputs = _inputs(steps)
    kind = device.partition(":")[0]
    held = max((f.size for f in files), default=0) if in_memory else 0
    cut = budget(steps, memory=memory, threads=threads, device=device, held=held)
    return Plan(
        label=checkpoint.label,
        steps=tuple(steps),
        files=tuple(files),
        side=tuple(side),
        inputs=inputs,
        roots=checkpoint.roots,
        tied=tuple(checkpoint.tied.items()),
        budget=cut,
        notes=(*notes(checkpoint, steps), *keep_notes(steps, cut), *far_notes(steps, cut)),
        hash=_hash(steps, side, inputs, kind),
        held_file=held,
    )


def _step(output: TensorSpec, expr: Expr, place: tuple[str, int]) -> Step:
    nodes = tuple(walk(expr))
    grain, chunk = extent(nodes)
    measuring = [n.method for n in nodes if isinstance(n, Apply) and n.method.measure is not None]
    wide = 8 if expr.dtype.name == "float64" else 4
    return Step(
        output=output,
        expr=expr,
        reads=tuple(dict.fromkeys(n for n in nodes if isinstance(n, Read))),
        file=place[0],
        offset=place[1],
        chunk=chunk,
        grain=grain,
        passes=1 + sum(m.walks for m in measuring),
        kept_bytes=kept_bytes(nodes, output.numel, wide),
        held_bytes=held_bytes(nodes, wide),
        tile_bytes=tile_bytes(expr),
    )


def _disk_order(step: Step) -> tuple[Location, str]:
    """Steps go in the order in which their first input lies on disk."""
    if not step.reads:  # rows that no model has
        return Location("", 0), step.output.name
    first = step.reads[0]
    return first.source.location(first.spec.name), step.output.name


def _main_dtypes(steps: list[Step]) -> dict[str, DType]:
    """The float type of most elements, by folder."""
    sizes: dict[str, Counter[DType]] = {}
    for step in steps:
        if step.output.dtype.kind == "float":
            counted = sizes.setdefault(step.output.folder, Counter())
            counted[step.output.dtype] += step.output.numel
    return {folder: counted.most_common(1)[0][0] for folder, counted in sizes.items()}


def _inputs(steps: list[Step]) -> tuple[InputFile, ...]:
    """The files that hold a tensor that is read, by path."""
    known: dict[str, InputFile] = {}
    used: dict[str, None] = {}
    for step in steps:
        for read in step.reads:
            path = read.source.location(read.spec.name).file
            if path and path not in known:
                known.update((f.path, f) for f in read.source.files)
            used[path] = None
    return tuple(known[path] for path in sorted(used) if path)


def _hash(
    steps: list[Step], side: list[SideOutput], inputs: tuple[InputFile, ...], kind: str
) -> str:
    """SHA-256 over all that decides the output's bytes, and nothing else.

    Weights in memory may change unseen, so a plan that reads them is like no other.
    """
    digest = hashlib.sha256(f"hf-merge plan {FORMAT} {kind}\n".encode())
    names = source_names(steps)
    for identity, letter in names.items():
        digest.update(f"source {letter} {identity!r}\n".encode())
    if any(not r.source.files for s in steps for r in s.reads):
        digest.update(uuid.uuid4().bytes)
    for file in inputs:
        digest.update(f"input {file.path!r} {file.size} {file.mtime_ns}\n".encode())
    for s in steps:
        digest.update(
            f"{s.output} {s.file!r} {s.offset} {s.chunk} {formula(s.expr, names)}\n".encode()
        )
    for out in side:
        digest.update(f"side {out.name!r} {out.path!r} {out.stamp} {out.text!r}\n".encode())
        if out.data is not None:
            digest.update(f"data {hashlib.sha256(out.data).hexdigest()}\n".encode())
    return digest.hexdigest()
