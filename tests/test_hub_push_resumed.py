"""Publishing that is killed, and goes on in a new process; and what is to be seen of the token."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from merge_cli import app

from merge import publishing
from merge.applying import apply_plan, plan_recipe
from merge.errors import OutputRefused
from merge.publishing import Published, Target
from merge.run import WriteOptions
from tests.conftest import MakeModel
from tests.hub import TOKEN, Hub
from tests.pushing import SHARD, state

PUT = "PUT /upload/"
SHARDS = 6


@pytest.fixture
def recipe(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mean of two models of six shards; the folder of the test is the current one."""
    for seed in (0, 1):
        make_model(f"m{seed}", state(seed))
    models = "".join(f"  - {{model: {tmp_path}/m{s}, parameters: {{weight: 1}}}}\n" for s in (0, 1))
    path = tmp_path / "mean.yml"
    path.write_text(f"merge_method: linear\nmodels:\n{models}")
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return path


def pushed(hub: Hub, recipe: Path, *, fresh: bool = False, **how: Any) -> Published:
    """Publish the recipe, in this process."""
    repo = publishing.open_target(Target("me/merged", token=TOKEN, endpoint=hub.url, **how))
    planned = plan_recipe(recipe, shard_size=SHARD, in_memory=True)
    return publishing.push_planned(planned, repo, WriteOptions(fresh=fresh))


def local(recipe: Path) -> dict[str, bytes]:
    """What the recipe makes in a folder."""
    out = apply_plan(plan_recipe(recipe, shard_size=SHARD), recipe.parent / "local").path
    return {p.name: p.read_bytes() for p in out.iterdir()}


@contextmanager
def running(
    hub: Hub, recipe: Path, pattern: str, skip: int, *words: str, arrives: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A push in a process of its own, while the server is busy with one of its requests.

    It is the one after ``skip`` of its kind. arrives: the server does what it asks in the end.
    """
    arrived, leave = threading.Event(), threading.Event()

    def busy() -> None:
        arrived.set()
        leave.wait(60)
        if not arrives:
            raise ConnectionResetError

    hub.fault(pattern, skip=skip, **{"received" if arrives else "before": busy})
    apply = ["apply", str(recipe), "--shard-size", str(SHARD), "--push", "me/merged", *words]
    process = subprocess.Popen(
        [sys.executable, "-m", "merge_cli", *apply],
        env={**os.environ, "HF_TOKEN": TOKEN},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert arrived.wait(60)
        yield process
    finally:
        process.kill()
        process.communicate()
        leave.set()
        hub.faults.clear()


def killed_at(
    hub: Hub, recipe: Path, pattern: str, skip: int, *words: str, arrives: bool = False
) -> None:
    with running(hub, recipe, pattern, skip, *words, arrives=arrives) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_killed_while_sending(hub: Hub, recipe: Path) -> None:
    killed_at(hub, recipe, PUT, 2)
    assert hub.files("me/merged") == {}
    assert len(hub.repos["me/merged"].commits) == 1
    hub.forget()
    done = pushed(hub, recipe)
    assert len(done.outcome.kept) == 2
    assert len(hub.seen(PUT)) == len(done.outcome.sent) == SHARDS - 2
    assert done.report is not None
    assert done.report.bytes_written == (SHARDS - 2) * 2560  # computed no more than that
    assert hub.files("me/merged") == local(recipe)
    hub.forget()
    assert not pushed(hub, recipe).outcome.made and not hub.seen("PUT|commit/")
    again = pushed(hub, recipe, fresh=True)
    assert len(again.outcome.sent) == SHARDS and not again.outcome.kept


@pytest.mark.parametrize("arrives", [True, False])
def test_killed_while_committing(hub: Hub, recipe: Path, arrives: bool) -> None:
    """Whether the commit was made or not, there is one, and it is complete."""
    killed_at(hub, recipe, "POST .*/commit/", 0, arrives=arrives)
    commits = hub.repos["me/merged"].commits
    for _ in range(100 if arrives else 0):
        if len(commits) == 2:
            break
        time.sleep(0.05)
    assert pushed(hub, recipe).outcome.made == (not arrives)
    assert len(hub.seen(PUT)) == SHARDS and len(commits) == 2
    assert hub.files("me/merged") == local(recipe)


def test_killed_in_a_pull_request(hub: Hub, recipe: Path) -> None:
    hub.commit("me/merged", {"config.json": b"{}", "model.safetensors": b"old"})
    killed_at(hub, recipe, "POST .*/commit/", 0, "--create-pr")
    pushed(hub, recipe, create_pr=True)
    assert list(hub.repos["me/merged"].pulls) == [1]
    assert set(hub.files("me/merged")) == {"config.json", "model.safetensors"}
    assert hub.files("me/merged", "refs/pr/1") == local(recipe)


def test_what_is_lost_is_made_again(hub: Hub, recipe: Path) -> None:
    """By the server, or of the ledger: a line torn at its end, and what follows it."""
    killed_at(hub, recipe, PUT, 5)
    (ledger,) = (recipe.parent / "hf-home" / "assets").rglob("*.ledger")
    lines = ledger.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 5
    ledger.write_bytes(b"".join(lines[:4]) + lines[4][:40])
    del hub.blobs[next(oid for oid in hub.blobs if oid.encode() in lines[2])]
    hub.forget()
    done = pushed(hub, recipe)
    assert len(done.outcome.kept) == 2  # of the three whose lines are whole, one was lost
    assert len(done.outcome.sent) == SHARDS - 2
    assert len(hub.seen(PUT)) == 2  # that one, and the one that was on its way
    assert hub.files("me/merged") == local(recipe)


def test_interrupted_and_one_run_at_a_time(hub: Hub, recipe: Path) -> None:
    with running(hub, recipe, PUT, 1) as process:
        with pytest.raises(OutputRefused, match="another run"):
            pushed(hub, recipe)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "run the same command again" in said
    assert len(pushed(hub, recipe).outcome.kept) == 1


def test_the_token_is_nowhere(
    hub: Hub,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not in output, errors, ledgers, cards, commits or crash files, whatever goes wrong."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)

    def ran(*words: str) -> tuple[int, str]:
        arguments = [str(recipe), *words, "--push", "me/merged", "--token", TOKEN]
        monkeypatch.setattr("sys.argv", ["merge", "apply", *arguments])
        with pytest.raises(SystemExit) as end:
            app.main()
        return int(end.value.code or 0), "".join(capfd.readouterr())

    def broken(self: object) -> None:
        raise ZeroDivisionError(repr(self))

    said = []
    for pattern, status in (
        ("commit/", 413),
        ("preupload/", 403),
        ("whoami", 401),
        ("/tree/", 404),
    ):
        hub.fault(pattern, status=status)
        code, text = ran("--json", "--fresh")
        assert code == 4 and str(status) in text
        said.append(text)
        hub.faults.clear()
        hub.repos.clear()
    with monkeypatch.context() as patch:
        patch.setattr(publishing.Publication, "run", broken)
        code, text = ran()
        assert code == 70 and "defect" in text
        said.append(text)
    said += [ran("out", "--json")[1], ran("--json")[1]]
    (crash,) = (recipe.parent / "tmp").glob("hf-merge-*.txt")
    assert "ZeroDivisionError" in crash.read_text()
    texts = [t.encode() for t in said]
    texts += [p.read_bytes() for p in recipe.parent.rglob("*") if p.is_file()]
    texts += list(hub.files("me/merged").values())
    texts += [c.title.encode() for c in hub.repos["me/merged"].commits.values()]
    assert not [t for t in texts if TOKEN.encode() in t]
    assert not hub.leaks
