"""Kill, fail and interrupt a merge at every step: nothing partial shows, and a rerun completes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import merge
from merge.write import ops

from .conftest import Job, files_of

OPERATIONS = (
    "open_file",
    "allocate",
    "pwrite",
    "fsync",
    "fsync_folder",
    "mkdir",
    "rename",
    "unlink",
)
MakeJob = Callable[..., Job]


def at_call(number: int, fault: Callable[[str], None]) -> Callable[[], None]:
    """Patch the sink's file operations so that the ``number``-th call of any of them faults."""

    def install() -> None:
        count = 0

        def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*args: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    fault(name)
                return real(*args)

            return operation

        for name in OPERATIONS:
            setattr(ops, name, wrap(name, getattr(ops, name)))

    return install


def kill(_name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_with(code: int) -> Callable[[str], None]:
    def fault(name: str) -> None:
        raise OSError(code, os.strerror(code), name)

    return fault


@pytest.fixture
def calls(job: Job) -> int:
    """How many file operations an undisturbed run makes, whose output is then removed."""
    with pytest.MonkeyPatch.context() as patch:
        made: list[str] = []

        def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args: (made.append(name), real(*args))[1]

        for name in OPERATIONS:
            patch.setattr(ops, name, counting(name, getattr(ops, name)))
        job.run()
    shutil.rmtree(job.out)
    return len(made)


def test_a_kill_at_fifty_random_operations_leaves_nothing_partial_and_a_rerun_is_bit_equal(
    job: Job, calls: int
) -> None:
    for number in random.Random(5).sample(range(1, calls + 1), 50):
        assert os.WIFSIGNALED(job.in_child(at_call(number, kill)))
        job.check_absent_or_complete()
        job.run()
        job.check_complete_and_clean()
        shutil.rmtree(job.out)


def test_a_kill_at_random_moments_leaves_nothing_partial_and_a_rerun_is_bit_equal(
    job: Job,
) -> None:
    draw = random.Random(6)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            job.run()
            os._exit(0)
        time.sleep(draw.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        job.check_absent_or_complete()
        job.run()
        job.check_complete_and_clean()
        shutil.rmtree(job.out)


def test_many_kills_in_a_row_still_make_progress(job: Job) -> None:
    for number in (30, 30, 30):
        assert os.WIFSIGNALED(job.in_child(at_call(number, kill)))
    job.run()
    job.check_complete_and_clean()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["no space", "I/O error"])
def test_each_operation_that_fails_is_reported_and_a_rerun_completes(
    job: Job, calls: int, code: int
) -> None:
    first_and_last = {*range(1, 15), *range(calls - 14, calls + 1)}
    for number in sorted(first_and_last | set(range(15, calls - 14, 7))):
        status = job.in_child(at_call(number, fail_with(code)))
        assert os.waitstatus_to_exitcode(status) == 4, f"operation {number} of {calls}"
        job.check_absent_or_complete()
        job.run()
        job.check_complete_and_clean()
        shutil.rmtree(job.out)


def test_a_rerun_takes_up_what_was_done(job: Job) -> None:
    job.in_child(at_call(60, kill))
    report = merge.run.save_plan(job.plan, job.out).report
    assert report is not None and report.resumed_chunks > 5
    assert report.chunks + report.resumed_chunks == sum(
        len(list(s.chunks(i))) for i, s in enumerate(job.plan.steps)
    )


def test_a_fresh_run_takes_up_nothing(job: Job) -> None:
    job.in_child(at_call(60, kill))
    report = merge.run.save_plan(job.plan, job.out, merge.run.WriteOptions(fresh=True)).report
    assert report is not None and report.resumed_chunks == 0
    job.check_complete_and_clean()


def test_a_finished_chunk_that_was_damaged_meanwhile_is_computed_again(job: Job) -> None:
    job.in_child(at_call(60, kill))
    (stage,) = job.out.parent.glob("*.partial-*")
    for file in stage.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        file.write_bytes(data)
    job.run()
    job.check_complete_and_clean()


def test_work_of_another_plan_is_cleared_away(job: Job, inputs: list[Any]) -> None:
    job.in_child(at_call(60, kill))
    merge.average(inputs).save(job.out)
    assert [p.name for p in job.out.parent.iterdir()] == [job.out.name]


def test_a_complete_output_of_the_same_plan_is_left_alone(job: Job) -> None:
    job.run()
    before = {p: p.stat().st_mtime_ns for p in job.out.iterdir()}
    assert merge.run.save_plan(job.plan, job.out).report is None
    assert {p: p.stat().st_mtime_ns for p in job.out.iterdir()} == before


@pytest.mark.parametrize("before_the_end", range(8))
def test_replacing_an_output_keeps_the_old_one_until_the_new_one_is_whole(
    job: Job, calls: int, before_the_end: int
) -> None:
    old = replace(job, how=merge.run.WriteOptions(replace=True))
    job.out.mkdir()
    (job.out / "old").write_text("precious")
    assert os.WIFSIGNALED(old.in_child(at_call(calls + 1 - before_the_end, kill)))
    found = [files_of(f) for f in job.out.parent.iterdir() if f.is_dir()]
    assert {"old": b"precious"} in found or job.wanted in found
    old.run()
    job.check_complete_and_clean()


def test_the_lock_of_a_run_that_died_after_it_published_is_removed(job: Job) -> None:
    job.run()
    job.out.with_name("out.lock").write_text("{}")
    job.run()
    job.check_complete_and_clean()
