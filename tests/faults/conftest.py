"""A small merge to disturb, run in a forked child, and what must hold afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import merge
from merge import run
from merge.plan.model import Plan
from merge.run import PlanOptions, WriteOptions

TENSORS = 30


@dataclass(frozen=True)
class Job:
    """A TIES merge of thirty tensors, what it must yield, and where it goes."""

    plan: Plan
    out: Path
    wanted: dict[str, bytes]
    how: WriteOptions = WriteOptions()

    def run(self) -> None:
        run.save_plan(self.plan, self.out, self.how)

    def in_child(self, prepare: Callable[[], None] = lambda: None) -> int:
        """Run the job in a forked child after ``prepare``; its wait status."""
        child = os.fork()
        if child == 0:
            code = 99
            try:
                prepare()
                self.run()
                code = 0
            except merge.MergeError as error:
                code = error.exit_code
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1]

    def check_absent_or_complete(self) -> None:
        """The output is not there, or it is whole; never a part of it."""
        if self.out.exists():
            assert files_of(self.out) == self.wanted

    def check_complete_and_clean(self) -> None:
        """The output is bit-equal to an undisturbed run's, and nothing lies beside it."""
        assert files_of(self.out) == self.wanted
        assert [p.name for p in self.out.parent.iterdir()] == [self.out.name]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tunes of thirty tensors, one of them larger than a chunk."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("inputs")
    draw = torch.Generator().manual_seed(1)
    shapes = {f"layers.{i}.w": (64, 33 + i) for i in range(TENSORS - 1)} | {"big": (2200, 1000)}
    folders = []
    for name in ("base", "a", "b"):
        (root / name).mkdir()
        tensors = {k: torch.randn(s, generator=draw).bfloat16() for k, s in shapes.items()}
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text('{"model_type": "toy"}')
        folders.append(root / name)
    return folders


@pytest.fixture
def make_job(inputs: list[Path], tmp_path: Path) -> Callable[..., Job]:
    """``make_job()``: the job, its expected files computed once undisturbed."""

    def make(out: Path | None = None) -> Job:
        base, *tuned = inputs
        lazy = merge.ties(tuned, base=base, weight=0.7, density=0.4)
        plan = run.plan(lazy, PlanOptions(threads=2, shard_size=2_000_000))
        calm = tmp_path / "calm" / "out"
        if not calm.exists():
            run.save_plan(plan, calm)
        (tmp_path / "work").mkdir(exist_ok=True)
        return Job(plan, out or tmp_path / "work" / "out", files_of(calm))

    return make


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    """The job, writing to a folder of its own."""
    return make_job()
