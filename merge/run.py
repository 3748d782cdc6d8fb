"""From a checkpoint to its bytes: plan, engine and sink joined. `Checkpoint`'s verbs end here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge.errors import PlanError
from merge.families.reconcile import reconcile
from merge.ir.checkpoint import Checkpoint
from merge.plan import make_plan, parse_bytes
from merge.plan.model import Plan, SideOutput
from merge.write.card import CARD

if TYPE_CHECKING:
    import torch

    from merge.engine.execute import Report
    from merge.engine.finite import Policy

__all__ = [
    "SHARD_SIZE",
    "PlanOptions",
    "Saved",
    "WriteOptions",
    "check_target",
    "device_of",
    "plan",
    "reconcile",
    "save",
    "save_plan",
    "state_dict",
]


SHARD_SIZE = "5GB"
"""The largest weight file, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How a checkpoint is computed, and what is written with it. Sizes: bytes, or "256MiB".

    memory: bound of the buffers. threads: workers, by default one for each core. card: with a
    README.md. copy_code: with the programs that came with the model. in_memory: its weight files
    are published without a local copy.
    """

    memory: int | str | None = None
    threads: int | None = None
    device: str = "cpu"
    shard_size: int | str = SHARD_SIZE
    card: bool = True
    copy_code: bool = False
    in_memory: bool = False


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How an output comes about.

    replace: allows a folder that is not empty. fresh: forgets what an interrupted run has done.
    non_finite: whether NaN and infinity are errors. progress: called with bytes read and written
    since the last call.
    """

    replace: bool = False
    fresh: bool = False
    non_finite: Policy = "error"
    progress: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished output. ``report`` is None when it was there already, complete and verified."""

    path: Path
    plan: Plan
    report: Report | None


def plan(
    checkpoint: Checkpoint,
    options: PlanOptions = PlanOptions(),
    *,
    extra: Iterable[SideOutput] = (),
) -> Plan:
    """The plan of ``checkpoint``. extra: files beside those that it has."""
    if options.copy_code:
        checkpoint = replace(checkpoint, side=checkpoint.side.with_code())
    notes: tuple[str, ...] = ()
    if options.card:
        from merge.card import checkpoint_card

        text, notes = checkpoint_card(checkpoint)
        extra = [*extra, SideOutput(CARD, text=text)]
    made = make_plan(
        checkpoint,
        memory=None if options.memory is None else parse_bytes(options.memory),
        threads=options.threads,
        device=device_of(options.device),
        shard_size=parse_bytes(options.shard_size),
        extra=extra,
        in_memory=options.in_memory,
    )
    return replace(made, notes=(*notes, *made.notes))


def save(
    checkpoint: Checkpoint,
    out: str | Path,
    options: PlanOptions = PlanOptions(),
    how: WriteOptions = WriteOptions(),
) -> Saved:
    """Plan ``checkpoint`` and compute it into the folder ``out``."""
    return save_plan(plan(checkpoint, options), Path(out), how)


def save_plan(
    plan: Plan,
    out: Path,
    how: WriteOptions = WriteOptions(),
) -> Saved:
    """Compute ``plan`` into the folder ``out``, which appears whole or not at all.

    An output of the very same plan that is complete and verified is left as it is.
    """
    from merge.verify import holds_plan
    from merge.write.folder import FolderSink, settle

    if not how.replace and not how.fresh and holds_plan(out, plan.hash):
        settle(out)
        return Saved(out, plan, None)
    from merge.engine.execute import execute

    with FolderSink(plan, out, replace=how.replace, fresh=how.fresh) as sink:
        report = execute(plan, sink, progress=how.progress, non_finite=how.non_finite)
        sink.publish()
    return Saved(out, plan, report)


def check_target(plan: Plan, out: Path) -> None:
    """Raise OutputRefused if ``out`` is, holds or lies in an input of ``plan``."""
    from merge.write.target import check_overlap

    check_overlap(out, plan.roots)


def state_dict(
    checkpoint: Checkpoint, *, threads: int | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Compute ``checkpoint`` into memory. Tied names share one tensor."""
    from merge.engine.execute import execute
    from merge.write.memory import MemorySink

    made = plan(checkpoint, PlanOptions(threads=threads, device=device, card=False))
    sink = MemorySink(made)
    execute(made, sink)
    return {name: sink.tensors[checkpoint.tied.get(name, name)] for name in checkpoint.tensors}


def device_of(wanted: str) -> str:
    """``cpu``, or a CUDA device that is there; ``auto`` takes a GPU when there is one."""
    if wanted == "cpu":
        return wanted
    if wanted != "auto" and wanted.partition(":")[0] != "cuda":
        raise PlanError("unknown device", found=wanted, expected="cpu, cuda, cuda:N or auto")
    import torch

    if torch.cuda.is_available():
        return "cuda" if wanted == "auto" else wanted
    if wanted == "auto":
        return "cpu"
    raise PlanError("there is no CUDA device here", found=wanted, do="use --device cpu or auto")
