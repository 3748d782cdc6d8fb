"""Publishing on the test Hub: shard by shard without a disk, whole or not at all, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import merge
from merge import publishing, run
from merge.errors import SourceError
from merge.publishing import Published, Target
from tests.conftest import MakeModel
from tests.hub import TOKEN, Hub

Push = Callable[..., Published]
SHARD = 3000
"""Bytes of a shard: of the models here, one or two tensors."""


def state(seed: int, tensors: int = 6) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(40, 16, generator=made) for i in range(tensors)}


@pytest.fixture
def mean(make_model: MakeModel) -> merge.Checkpoint:
    """The mean of two small models."""
    return merge.average([make_model("a", state(0)), make_model("b", state(1))])


@pytest.fixture
def push(hub: Hub) -> Push:
    """Push a checkpoint or a folder to the test Hub."""

    def pushed(what: merge.Checkpoint | Path, repo: str = "me/merged", **how: Any) -> Published:
        options = {k: how.pop(k) for k in ("branch", "create_pr", "private", "message") if k in how}
        token = how.pop("token", TOKEN)
        target = publishing.open_target(Target(repo, token=token, endpoint=hub.url, **options))
        if isinstance(what, Path):
            return publishing.push_folder(what, target, **how)
        plan = run.plan(what, shard_size=how.pop("shard_size", SHARD))
        return publishing.push_plan(plan, target, **how)

    return pushed


def saved(checkpoint: merge.Checkpoint, out: Path) -> dict[str, bytes]:
    """What a local merge writes, by file."""
    checkpoint.save(out, shard_size=SHARD)
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_what_is_published_is_what_is_saved(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    done = push(mean)
    local = saved(mean, tmp_path / "local")
    assert len(done.outcome.sent) == len([n for n in local if n.endswith(".safetensors")]) > 3
    assert hub.files("me/merged") == local
    assert done.url == f"{hub.url}/me/merged"
    assert len(hub.repos["me/merged"].commits) == 2  # the first, empty one, and ours
    assert not hub.leaks


def test_a_finished_folder_is_published(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    local = saved(mean, tmp_path / "local")
    (tmp_path / "local" / ".cache").mkdir()
    (tmp_path / "local" / ".cache" / "x").write_text("not ours")
    first = push(tmp_path / "local")
    assert hub.files("me/merged") == local
    again = push(tmp_path / "local")
    assert not again.outcome.made and not again.outcome.sent
    assert again.outcome.commit == first.outcome.commit == hub.repos["me/merged"].head.sha
    hub.forget()
    push(tmp_path / "local", repo="me/other")
    assert hub.files("me/other") == local
    assert not hub.seen("PUT /upload")  # the bytes were there, of the other repo


def test_a_damaged_folder_is_not_published(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    saved(mean, tmp_path / "local")
    file = next((tmp_path / "local").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(SourceError, match="not what was written") as caught:
        push(tmp_path / "local")
    assert "differs from what was written" in str(caught.value)
    assert "me/merged" not in hub.repos
