"""A finished folder takes its place: by rename, with what it replaces set aside until it is there.

At no moment is there no output, or half of one: a run that dies between two renames leaves the old
output under ``OUT.replaced``, and the next run puts it back.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from merge.write import ops
from merge.write.target import is_used

__all__ = ["publish", "recover"]


def publish(stage: Path, out: Path, aside: Path, folders: Iterable[Path]) -> None:
    """Rename ``stage`` to ``out``. folders: those of the stage that got new names in them."""
    for folder in {stage, *folders}:
        ops.fsync_folder(folder)
    if is_used(out):
        ops.rename(out, aside)
    ops.rename(stage, out)
    ops.fsync_folder(out.parent)
    if aside.exists():
        shutil.rmtree(aside)


def recover(out: Path, aside: Path) -> None:
    """Finish or undo the renames of a run that died among them."""
    if aside.exists():
        if out.exists():
            shutil.rmtree(aside)
        else:
            ops.rename(aside, out)
