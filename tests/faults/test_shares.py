"""Kill `merge finish` at every file operation: nothing partial shows, and a rerun completes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from merge import ranks
from merge.plan.share import Rank, deal_plan
from merge.write.shares import share_folder

from .conftest import Job, files_of
from .test_crashes import MakeJob, at_call, kill


@pytest.fixture
def dealt(make_job: MakeJob, tmp_path: Path) -> tuple[Job, Path]:
    """A job whose two ranks are done, and a folder that holds only what they left."""
    job = make_job(tmp_path / "work" / "out")
    for rank in range(2):
        ranks.compute_share(job.plan, job.out, Rank(rank, 2))
    return job, job.out.parent


def finish_in_child(out: Path, number: int) -> int:
    """The wait status of a child that finishes ``out`` and is killed at its n-th operation."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            at_call(number, kill)()
            ranks.finish(out)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def test_finishing_can_be_killed_anywhere(dealt: tuple[Job, Path], tmp_path: Path) -> None:
    job, work = dealt
    shutil.copytree(work, tmp_path / "as it was")
    for number in range(1, 60):
        status = finish_in_child(job.out, number)
        job.check_absent_or_complete()
        if status == 0:
            break
        ranks.finish(job.out)
        job.check_complete_and_clean()
        shutil.rmtree(work)
        shutil.copytree(tmp_path / "as it was", work)
    else:
        raise AssertionError("never came to its end")
    assert number > 5
    job.check_complete_and_clean()


def test_a_rank_that_is_killed_is_taken_up_again(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(tmp_path / "work" / "out")
    rank = Rank(0, 1)
    for number in (3, 12, 30):
        child = os.fork()
        if child == 0:
            at_call(number, kill)()
            ranks.compute_share(job.plan, job.out, rank)
            os._exit(0)
        assert os.waitpid(child, 0)[1] != 0
        assert not share_folder(job.out, job.plan.hash, rank).exists()
    ranks.compute_share(job.plan, job.out, rank)
    share = files_of(share_folder(job.out, job.plan.hash, rank))
    assert {f.name for f in deal_plan(job.plan, rank).files} <= set(share)
    ranks.finish(job.out)
    job.check_complete_and_clean()
