"""A recipe on a Ray cluster of two workers, one of which is killed: the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import merge
from merge import applying

from .conftest import write_model
from .faults.conftest import files_of

pytest.importorskip("ray")

SCRIPT = """
import sys
from pathlib import Path
from merge import applying, on_ray
from merge.run import WriteOptions

recipe, out = map(Path, sys.argv[1:])
planned = applying.plan_recipe(recipe, shard_size="9MB")
done = on_ray.apply_on_ray(
    recipe, planned, out, {"shard_size": "9MB"}, how=WriteOptions(progress=print)
)
print(done)
"""


def owner_of(lock: Path) -> int | None:
    """The process that holds a share's lock, if it has written its name."""
    try:
        return int(json.loads(lock.read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return None


def kill_one(folder: Path, killed: list[int], stop: threading.Event) -> None:
    """Kill the first worker that is seen at work."""
    while not stop.is_set():
        for lock in folder.glob("out.share-*.lock"):
            pid = owner_of(lock)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
        time.sleep(0.001)


def test_a_worker_is_killed_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    for name in ("a", "b"):
        tensors = {f"layers.{i}.w": torch.randn(1500, 1500, generator=draw) for i in range(6)}
        write_model(tmp_path / name, tensors)
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: slerp\nbase_model: {tmp_path}/a\nmodels: [{{model: {tmp_path}/b}}]\n"
        "parameters: {t: 0.3}\n"
    )
    killed: list[int] = []
    stop = threading.Event()
    watch = threading.Thread(target=kill_one, args=(tmp_path, killed, stop))
    watch.start()
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, recipe, tmp_path / "out"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        )
    finally:
        stop.set()
        watch.join()
    assert done.returncode == 0, done.stderr
    assert killed, "no worker was seen at work"
    plan = applying.plan_recipe(recipe, shard_size="9MB")
    assert len(plan.plan.files) == 6
    sizes = [int(line) for line in done.stdout.split("\n") if line.isdecimal()]
    assert sorted(sizes) == sorted(f.size for f in plan.plan.files)
    applying.apply_plan(plan, tmp_path / "one")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")
    assert merge.verify(tmp_path / "out").ok
    assert [p.name for p in tmp_path.glob("out*")] == ["out"]
