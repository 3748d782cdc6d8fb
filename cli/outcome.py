"""What a run did, as JSON, and how much there is to do."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

import click

from merge import run
from merge.plan.model import Plan, human_bytes

if TYPE_CHECKING:
    from merge.engine.execute import Report

__all__ = ["computed", "outcome", "print_report", "work_bytes"]


def work_bytes(plan: Plan) -> int:
    """Bytes that a run of ``plan`` reads and writes."""
    return plan.read_bytes + sum(s.output.nbytes for s in plan.steps)


def outcome(saved: run.Saved) -> dict[str, object]:
    """What a run did into a folder."""
    return {"output": str(saved.path)} | computed(saved.report, saved.plan)


def computed(report: Report | None, plan: Plan) -> dict[str, object]:
    """What the engine did; None for nothing."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "plan": plan.hash,
        "already_complete": report is None,
        "seconds": report.seconds if report else 0.0,
        "bytes_read": report.bytes_read if report else 0,
        "bytes_written": report.bytes_written if report else 0,
        "resumed_chunks": report.resumed_chunks if report else 0,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "notes": list(plan.notes),
    }


def print_report(report: Report | None) -> None:
    """What a run did, on stderr."""
    if report is None:
        click.echo("the output was there already, complete and verified", err=True)
        return
    moved = report.bytes_read + report.bytes_written
    resumed = f", {report.resumed_chunks} pieces resumed" if report.resumed_chunks else ""
    click.echo(
        f"done in {report.seconds:.1f} s, {human_bytes(moved / max(report.seconds, 1e-9))}/s"
        f"{resumed}",
        err=True,
    )
