"""Runs one merge as a process of its own and says what it cost.

The measuring process must stay small, because Linux counts the peak of the parent as the child's
until the child grows beyond it. So no numpy here, and the models are made by another process.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MERGE = [sys.executable, "-m", "merge_cli"]

# The fastest settings found: lazy loading, small shards written while the next is computed, and
# none of the extras. Threads are left to torch, which the heavier methods need.
PEER_FLAGS = [
    "--lazy-unpickle",
    "--async-write",
    "--out-shard-size=200M",
    "--no-copy-tokenizer",
    "--no-write-model-card",
    "--quiet",
]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Run:
    """The cost of a whole process: seconds of wall clock and processor, and peak bytes."""

    wall: float
    cpu: float
    peak_rss: int


@dataclass(frozen=True, slots=True)
class Merge:
    """The cost of our command; `body` is the part from the first read to the published output."""

    wall: float
    cpu: float
    peak_rss: int
    body: float
    nbytes: int  # read and written


def process(command: Sequence[str]) -> tuple[Run, str]:
    """What the command cost, start-up included, and its stdout; a failure ends the benchmark."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        environment = os.environ | OFFLINE
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        # Not child.wait(): only wait4 gives this child's usage alone.
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        text, errors = stdout.read().decode(), stderr.read().decode()
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {child.returncode}:\n{errors[-4000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit), text


def merge(command: Sequence[str], recipe: str, out: Path, flags: Sequence[str] = ()) -> Merge:
    """What our command cost on this recipe; its output, below `out`, is deleted again."""
    run, stdout = _merged([*command, "apply"], recipe, out, ["--json", *flags])
    report = json.loads(stdout)
    nbytes = report["bytes_read"] + report["bytes_written"]
    return Merge(run.wall, run.cpu, run.peak_rss, report["seconds"], nbytes)


def peer(python: Path, recipe: str, out: Path) -> Run:
    """What mergekit, installed beside this python, cost on this recipe."""
    run, _ = _merged([str(python.parent / "mergekit-yaml")], recipe, out, PEER_FLAGS)
    return run


def _merged(
    command: Sequence[str], recipe: str, out: Path, flags: Sequence[str]
) -> tuple[Run, str]:
    """The cost and the stdout of `command RECIPE OUT flags`, whose output is removed."""
    file, folder = out / "recipe.yml", out / "merged"
    file.write_text(recipe)
    try:
        return process([*command, str(file), str(folder), *flags])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def peer_version(python: Path) -> str:
    """The version of the mergekit that this python has."""
    query = "from importlib.metadata import version; print(version('mergekit'))"
    _, stdout = process([str(python), "-c", query])
    return stdout.strip()


def models(out: Path, size: str, finetunes: int) -> list[Path]:
    """The folders of a base model and its fine-tunes, generated below `out` where missing."""
    print(f"models: {size}, a base and {finetunes} fine-tunes", file=sys.stderr)
    folder = out.resolve() / size
    script = Path(__file__).with_name("models.py")
    command = [sys.executable, str(script), str(folder), f"--size={size}"]
    process([*command, f"--finetunes={finetunes}"])
    return [folder / name for name in ("base", *(f"ft{k + 1}" for k in range(finetunes)))]


def memory_disk() -> Path:
    """Where outputs go unless told: a RAM disk, so that no other disk's speed is measured."""
    disk = Path("/dev/shm")
    return disk if disk.is_dir() else Path(tempfile.gettempdir())
