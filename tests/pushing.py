"""What tests of publishing share: small models, and a way to push them to the test Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import merge
from merge import publishing, run
from merge.publishing import Published, Target
from merge.publishing_folder import push_folder
from merge.run import PlanOptions, WriteOptions
from tests.conftest import MakeModel
from tests.hub import TOKEN, Hub

Push = Callable[..., Published]

SHARD = 3000
"""Bytes of a shard: of the models here, one tensor."""


def state(seed: int, tensors: int = 6) -> dict[str, torch.Tensor]:
    """Tensors of 2560 bytes each."""
    made = torch.Generator().manual_seed(seed)
    return {f"layer.{i:03d}.weight": torch.randn(40, 16, generator=made) for i in range(tensors)}


def mean_of(make_model: MakeModel, tensors: int = 6) -> merge.Checkpoint:
    """The mean of two small models, which is as many shards as tensors."""
    return merge.average([make_model(f"m{s}-{tensors}", state(s, tensors)) for s in (0, 1)])


def saved(checkpoint: merge.Checkpoint, out: Path) -> dict[str, bytes]:
    """What a local merge writes, by file."""
    checkpoint.save(out, shard_size=SHARD)
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def pusher(hub: Hub) -> Push:
    """Pushes a checkpoint or a folder to the test Hub."""

    def pushed(what: merge.Checkpoint | Path, repo: str = "me/merged", **how: Any) -> Published:
        options = {k: how.pop(k) for k in ("branch", "create_pr", "private", "message") if k in how}
        token = how.pop("token", TOKEN)
        target = publishing.open_target(Target(repo, token=token, endpoint=hub.url, **options))
        if isinstance(what, Path):
            return push_folder(what, target, **how)
        plan = run.plan(what, PlanOptions(shard_size=SHARD, in_memory=True))
        notice = how.pop("notice", lambda _: None)
        return publishing.push_plan(plan, target, WriteOptions(**how), notice)

    return pushed
