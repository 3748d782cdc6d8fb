"""``merge apply`` where several machines share the work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from merge import on_ray, publishing_shares, ranks
from merge.applying import Planned
from merge.run import WriteOptions

from .outcome import outcome, work_bytes
from .progress import progress_bar
from .push import tell

if TYPE_CHECKING:
    from merge.write.admission import Admission

__all__ = ["apply_on_ray", "apply_share", "send_share"]


def apply_share(
    planned: Planned,
    out: Path,
    rank: ranks.Rank,
    how: WriteOptions,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compute this machine's share and say what is to follow."""
    if not quiet:
        click.echo(f"this is rank {rank.rank} of {rank.world} (from {rank.told_by})", err=True)
    targets = planned.targets(out)
    total = sum(work_bytes(ranks.deal_plan(plan, rank)) for _, plan in targets)
    with progress_bar(total, quiet=quiet) as advance:
        saved = ranks.apply_share(planned, out, rank, replace(how, progress=advance))
    if as_json:
        click.echo(json.dumps(outcome(saved) | {"rank": rank.rank, "world": rank.world}, indent=2))
        return
    if not quiet:
        outs = " ".join(str(folder) for folder, _ in targets)
        click.echo(f"when all {rank.world} ranks are done: merge finish {outs}", err=True)
    click.echo(str(saved.path))


def send_share(
    planned: Planned,
    out: Path,
    rank: ranks.Rank,
    repo: Admission,
    how: WriteOptions,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compute and send this machine's share, and say what is to follow."""
    say = tell(quiet)
    say(f"this is rank {rank.rank} of {rank.world} (from {rank.told_by})")
    share = ranks.deal_plan(planned.plan, rank)
    with progress_bar(work_bytes(share) + share.write_bytes, quiet=quiet) as advance:
        done = publishing_shares.send_share(
            planned, out, rank, repo, replace(how, progress=advance), notice=say
        )
    if as_json:
        found = {"output": str(done.place), "plan": done.plan, "sent": list(done.sent)}
        click.echo(json.dumps(found | {"rank": rank.rank, "world": rank.world}, indent=2))
        return
    say(f"when all {rank.world} ranks are done: merge finish {out} --push {repo.repo}")
    click.echo(str(done.place))


def apply_on_ray(
    recipe: Path,
    planned: Planned,
    out: Path,
    options: Mapping[str, Any],
    address: str | None,
    how: WriteOptions,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a recipe on a Ray cluster."""
    total = sum(plan.write_bytes for _, plan in planned.targets(out))
    with progress_bar(total, quiet=quiet) as advance:
        done = on_ray.apply_on_ray(
            recipe, planned, out, options, address=address, how=replace(how, progress=advance)
        )
    if as_json:
        click.echo(json.dumps({"output": str(done.path), "plan": done.plan}, indent=2))
    else:
        click.echo(str(done.path))
