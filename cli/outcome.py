"""What a run did, as JSON, and how much there is to do."""

from __future__ import annotations

import resource
import sys

from merge import run
from merge.plan.model import Plan

__all__ = ["outcome", "work_bytes"]


def work_bytes(plan: Plan) -> int:
    """Bytes that a run of ``plan`` reads and writes."""
    return plan.read_bytes + sum(s.output.nbytes for s in plan.steps)


def outcome(saved: run.Saved) -> dict[str, object]:
    """What a run did."""
    report = saved.report
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "output": str(saved.path),
        "plan": saved.plan.hash,
        "already_complete": report is None,
        "seconds": report.seconds if report else 0.0,
        "bytes_read": report.bytes_read if report else 0,
        "bytes_written": report.bytes_written if report else 0,
        "resumed_chunks": report.resumed_chunks if report else 0,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "notes": list(saved.plan.notes),
    }
