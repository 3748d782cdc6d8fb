"""``merge apply``: run a recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from merge import ranks, run
from merge.errors import RecipeError
from merge.plan.model import human_bytes

from .options import json_option, quiet_option, rank_options, smoke_options, work_options
from .outcome import outcome, work_bytes
from .progress import progress_bar
from .share import apply_on_ray, apply_share
from .smoke import smoke_check

__all__ = ["apply_command"]


@click.command("apply", epilog="Example: merge apply recipe.yml merged/ --memory 256MiB")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@work_options
@click.option("--resume/--fresh", default=True, help="Take up interrupted work, or start over.")
@click.option("--replace", is_flag=True, help="Replace an output folder that is not empty.")
@click.option("--allow-non-finite", is_flag=True, help="Let NaN and infinity pass.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@rank_options
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: share the work out over a Ray cluster; needs hf-merge[ray].",
)
@click.option("--ray-address", metavar="ADDRESS", help="Of the cluster. [default: RAY_ADDRESS]")
@smoke_options
@json_option
@quiet_option
def apply_command(
    recipe: Path,
    out: Path | None,
    resume: bool,
    replace: bool,
    allow_non_finite: bool,
    dry_run: bool,
    rank: int | None,
    world: int | None,
    engine: str,
    ray_address: str | None,
    smoke: bool,
    smoke_against: Path | None,
    as_json: bool,
    quiet: bool,
    **work: Any,
) -> None:
    """Run RECIPE into the folder OUT (named after the recipe if left out).

    OUT appears whole or not at all. After an interruption the same command resumes. With --smoke
    the exit code is 3 when OUT, which stays, does not load or gives no numbers.

    With --rank and --world, or under torchrun, srun and the like, each process computes whole
    weight files of OUT, and `merge finish OUT` then puts them together.
    """
    check = smoke_check(smoke, smoke_against)
    share = ranks.rank_of(os.environ, rank, world)
    if share is not None and (smoke or smoke_against):
        raise RecipeError("a share of a model cannot be loaded", key="--smoke", found=str(share))
    planned = run.plan_recipe(recipe, compute=not dry_run, **work)
    plan = planned.plan
    target = out or Path(recipe.stem)
    if dry_run:
        for folder, each in [*planned.stages, (target, plan)]:
            run.check_target(each, folder)
        click.echo(json.dumps(plan.to_json(), indent=2) if as_json else str(plan))
        return
    if not quiet:
        for folder, each in planned.stages:
            click.echo(f"{folder}: {each}", err=True)
        click.echo(str(plan), err=True)
    how: dict[str, Any] = {
        "replace": replace,
        "fresh": not resume,
        "non_finite": "allow" if allow_non_finite else "error",
    }
    if share is not None:
        apply_share(planned, target, share, as_json=as_json, quiet=quiet, **how)
        return
    if engine == "ray":
        apply_on_ray(
            recipe, planned, target, work, ray_address, as_json=as_json, quiet=quiet, **how
        )
        checked = check(target)
        click.echo(str(checked), err=True, nl=bool(checked))
        if not checked.ok:
            raise click.exceptions.Exit(3)
        return
    total = sum(work_bytes(p) for p in (plan, *(p for _, p in planned.stages)))
    with progress_bar(total, quiet=quiet) as advance:
        saved = run.apply_plan(planned, target, progress=advance, **how)
    report = saved.report
    checked = check(saved.path)
    if as_json:
        click.echo(json.dumps(outcome(saved) | checked.to_json(), indent=2))
    elif not quiet and report is None:
        click.echo("the output was there already, complete and verified", err=True)
    elif not quiet and report is not None:
        moved = report.bytes_read + report.bytes_written
        resumed = f", {report.resumed_chunks} pieces resumed" if report.resumed_chunks else ""
        click.echo(
            f"done in {report.seconds:.1f} s, {human_bytes(moved / max(report.seconds, 1e-9))}/s"
            f"{resumed}",
            err=True,
        )
    if not as_json:
        click.echo(str(saved.path))
        click.echo(str(checked), err=True, nl=bool(checked))
    if not checked.ok:
        raise click.exceptions.Exit(3)
