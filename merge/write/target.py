"""Whether an output may be written: not in an input, not in use, with room for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from merge.errors import OutputRefused, SinkError
from merge.plan.model import human_bytes

__all__ = ["check_memory", "check_overlap", "check_space", "check_unused", "is_used"]

_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_MARGIN = 1.05  # of the bytes to write


def check_overlap(out: Path, roots: tuple[str, ...]) -> None:
    """OutputRefused if ``out`` is, lies in, or contains an input (compared by device and inode)."""
    above_out = _ancestors(out)
    here = _identity(out)
    for root in map(Path, roots):
        inside = _identity(root)
        if inside is not None and inside in above_out:
            relation = "is" if inside == here else "lies inside"
        elif here is not None and here in _ancestors(root):
            relation = "contains"
        else:
            continue
        raise OutputRefused(
            f"the output {relation} an input, which a merge never touches",
            output=out,
            found=f"input {root}",
            do="choose another output folder",
        )


def _ancestors(path: Path) -> set[tuple[int, int]]:
    """Device and inode of ``path`` and of every folder above it that exists."""
    real = Path(os.path.realpath(path))
    found = (_identity(p) for p in (real, *real.parents))
    return {i for i in found if i is not None}


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def is_used(out: Path) -> bool:
    """Whether something is at ``out`` already; an empty folder is nothing."""
    if not out.exists() and not out.is_symlink():
        return False
    if not out.is_dir():
        raise OutputRefused("the output is a file", output=out, expected="a folder, or nothing yet")
    return any(out.iterdir())


def check_unused(out: Path, *, replace: bool) -> None:
    """OutputRefused if something is at ``out`` already that may not be replaced."""
    if is_used(out) and not replace:
        raise OutputRefused(
            "the output folder is not empty",
            output=out,
            do="choose another, or allow it to be replaced: --replace",
        )


def check_memory(needed: int) -> None:
    """SinkError unless ``needed`` bytes of memory are free, as far as the system tells."""
    free = _free_memory()
    if free is not None and free < needed:
        raise SinkError(
            "not enough memory for a weight file and the buffers",
            found=f"{human_bytes(free)} free",
            expected=human_bytes(needed),
            do="make smaller weight files with --shard-size, smaller buffers with --memory, or"
            " write to a folder first and publish it with `merge push`",
        )


def _free_memory() -> int | None:
    """Bytes that can still be taken: of the machine, or of the group that this process is in."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")]
    except OSError:
        return None
    for limit, used in _GROUPS:
        try:
            most, taken = Path(limit).read_text().strip(), Path(used).read_text().strip()
        except OSError:
            continue
        if most.isdigit() and taken.isdigit():
            found.append(int(most) - int(taken) + _reclaimable(Path(used).parent))
    return max(0, min(found)) if found else None


def _reclaimable(group: Path) -> int:
    """Bytes of the page cache that count as used and are given up when memory is short."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    cached = {k: int(v) for k, _, v in (x.partition(" ") for x in lines) if v.isdigit()}
    return cached.get("total_inactive_file", cached.get("inactive_file", 0))


def check_space(folder: Path, needed: int) -> None:
    """SinkError unless ``folder`` has room for ``needed`` bytes and 5 % more."""
    free = shutil.disk_usage(folder).free
    if free < needed * _MARGIN:
        raise SinkError(
            "not enough space for the output",
            folder=folder,
            found=f"{human_bytes(free)} ({free} bytes) free",
            expected=f"{human_bytes(needed * _MARGIN)} ({int(needed * _MARGIN)} bytes)",
            do="make room, or write to another disk; then run the same command again",
        )
