"""Real disk limits, two runs on one output, signals, and folders that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import merge

from .conftest import Job

MakeJob = Callable[..., Job]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 12 MB; skipped where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, free: int) -> Path:
    """A file that leaves ``free`` bytes on the disk."""
    filler = disk / "filler"
    with filler.open("wb") as f:
        f.write(bytes(shutil.disk_usage(disk).free - free))
    return filler


def test_a_disk_without_room_is_refused_before_anything_is_written(
    make_job: MakeJob, small_disk: Path
) -> None:
    job = make_job(small_disk / "out")
    filler = fill(small_disk, 1_000_000)
    with pytest.raises(merge.SinkError, match="not enough space") as caught:
        job.run()
    assert str(small_disk) in str(caught.value)
    assert caught.value.exit_code == 4
    assert [p.name for p in small_disk.iterdir()] == ["filler"]
    filler.unlink()
    job.run()
    job.check_complete_and_clean()


def test_a_disk_that_fills_up_during_the_work_loses_nothing(
    make_job: MakeJob, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(small_disk / "out")
    filler = fill(small_disk, 2_000_000)
    with monkeypatch.context() as patch:  # another program took the space after the check
        patch.setattr("merge.write.folder.check_space", lambda *_: None)
        with pytest.raises(merge.SinkError, match="No space left on device") as caught:
            job.run()
    assert "free on that disk" in str(caught.value)
    assert not job.out.exists()
    filler.unlink()
    job.run()
    job.check_complete_and_clean()


def test_a_second_run_on_the_same_output_names_the_first_and_stops(job: Job) -> None:
    from merge.write.lock import OutputLock

    lock = OutputLock(job.out.with_name("out.lock"))
    lock.acquire()
    with pytest.raises(merge.OutputRefused, match=f"process {os.getpid()}"):
        job.run()
    lock.release()
    job.run()
    job.check_complete_and_clean()


def test_the_lock_of_a_dead_process_does_not_block(job: Job) -> None:
    child = os.fork()
    if child == 0:
        from merge.write.lock import OutputLock

        OutputLock(job.out.with_name("out.lock")).acquire()
        os._exit(0)
    os.waitpid(child, 0)
    assert job.out.with_name("out.lock").exists()
    job.run()
    job.check_complete_and_clean()


def test_an_input_that_changes_during_the_merge_is_an_error(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    a = make_model("a", {"w": torch.ones(4)})
    lazy = merge.open(a) * 1.0
    os.utime(a / "model.safetensors", ns=(1, 1))
    with pytest.raises(merge.SourceError, match="changed while it was in use"):
        lazy.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_written_is_named(job: Job) -> None:
    folder = job.out.parent
    folder.chmod(0o555)
    try:
        if os.geteuid() == 0:  # whom no permission stops
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("merge.write.ops.open_file", _denied)
                with pytest.raises(merge.SinkError, match="Permission denied") as caught:
                    job.run()
        else:
            with pytest.raises(merge.SinkError, match="Permission denied") as caught:
                job.run()
    finally:
        folder.chmod(0o755)
    assert str(folder) in str(caught.value)
    assert not list(folder.iterdir())


def _denied(path: Path, _flags: int) -> int:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_its_code_and_a_rerun_resumes(
    make_model: Callable[..., Path], tmp_path: Path, number: int, code: int
) -> None:
    import torch

    models = [make_model(n, {f"w{i}": torch.randn(1 << 20) for i in range(24)}) for n in "ab"]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: dare_ties\nbase_model: {models[0]}\nmodels:\n  - model: {models[1]}\n"
        "parameters: {weight: 0.5, density: 0.5}\n"
    )
    command = [sys.executable, "-m", "merge_cli", "apply", str(recipe), str(tmp_path / "out")]
    run = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out.partial-*/journal")):
        time.sleep(0.005)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == code, said
    assert "resume" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.lock").exists()
    subprocess.run([*command, "-q"], check=True, capture_output=True)
    assert merge.verify(tmp_path / "out").ok
    assert not list(tmp_path.glob("out.*"))
