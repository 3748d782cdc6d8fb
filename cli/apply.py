"""``merge apply``: run a recipe."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import click

from merge import ranks, run
from merge.applying import apply_plan, plan_recipe
from merge.errors import RecipeError
from merge.publishing import push_planned
from merge.publishing_folder import push_folder

from .options import (
    json_option,
    quiet_option,
    rank_options,
    replace_option,
    smoke_options,
    work_options,
)
from .outcome import computed, outcome, print_report, work_bytes
from .progress import progress_bar, step_lines, trial_lines
from .push import open_repo, print_published, push_options, split_push, tell
from .share import apply_on_ray, apply_share, send_share
from .smoke import smoke_check

__all__ = ["apply_command"]


@click.command("apply", epilog="Example: merge apply recipe.yml merged/ --memory 256MiB")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@work_options
@click.option("--resume/--fresh", default=True, help="Take up interrupted work, or start over.")
@replace_option
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
@click.option("--push", metavar="REPO", help="Publish the result as owner/name on the Hub.")
@push_options
@click.option(
    "--coefficients",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take these learned coefficients; nothing is learned, and no data is read.",
)
@smoke_options
@json_option
@quiet_option
def apply_command(
    recipe: Path,
    out: Path | None,
    coefficients: Path | None,
    resume: bool,
    replace: bool,
    allow_non_finite: bool,
    dry_run: bool,
    rank: int | None,
    world: int | None,
    engine: str,
    ray_address: str | None,
    push: str | None,
    smoke: bool,
    smoke_against: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run RECIPE into the folder OUT (named after the recipe if left out).

    OUT appears whole or not at all. After an interruption the same command resumes. With --smoke
    the exit code is 3 when OUT, which stays, does not load or gives no numbers.

    With --rank and --world, or under torchrun, srun and the like, each process computes whole
    weight files of OUT, and `merge finish OUT` then puts them together. With --push as well, each
    sends its files, and `merge finish OUT --push REPO` commits them.

    With --push the result is published: from memory, one weight file at a time and without a local
    copy, or, if OUT is given, from there.
    """
    check = smoke_check(smoke, smoke_against)
    work, to = split_push(options)
    share = ranks.rank_of(os.environ, rank, world)
    if share is not None and (smoke or smoke_against):
        raise RecipeError("a share of a model cannot be loaded", key="--smoke", found=str(share))
    straight = push is not None and (out is None or share is not None)
    if push is not None and engine == "ray":
        raise RecipeError(
            "what a cluster computes is published when it is finished",
            key="--push",
            do="leave out --push; then `merge push OUT REPO`",
        )
    if straight and smoke:
        raise click.UsageError("--smoke loads the result from a folder: give OUT too")
    repo = None if push is None else open_repo(push, to)
    target = out or Path(recipe.stem)
    alone = share is None and engine != "ray"
    planned = plan_recipe(
        recipe,
        compute=not dry_run,
        in_memory=straight,
        out=target if alone and not straight else None,
        fresh=not resume,
        watch=None if quiet else trial_lines(),
        learning=None if quiet else step_lines(),
        coefficients=coefficients,
        **work,
    )
    plan = planned.plan
    if dry_run:
        for folder, each in planned.stages if straight else planned.targets(target):
            run.check_target(each, folder)
        click.echo(json.dumps(plan.to_json(), indent=2) if as_json else str(plan))
        return
    if not quiet:
        for folder, each in planned.stages:
            click.echo(f"{folder}: {each}", err=True)
        click.echo(str(plan), err=True)
    how = run.WriteOptions(replace, not resume, "allow" if allow_non_finite else "error")
    if share is not None and repo is not None:
        send_share(planned, target, share, repo, how, as_json=as_json, quiet=quiet)
        return
    if share is not None:
        apply_share(planned, target, share, how, as_json=as_json, quiet=quiet)
        return
    if engine == "ray":
        apply_on_ray(recipe, planned, target, work, ray_address, how, as_json=as_json, quiet=quiet)
        checked = check(target)
        click.echo(str(checked), err=True, nl=bool(checked))
        if not checked.ok:
            raise click.exceptions.Exit(3)
        return
    total = sum(work_bytes(p) for p in (plan, *(p for _, p in planned.stages)))
    total += plan.write_bytes if repo is not None else 0  # sent
    with progress_bar(total, quiet=quiet) as advance:
        how = dataclasses.replace(how, progress=advance)
        if straight:
            assert repo is not None
            sent = push_planned(planned, repo, how, notice=tell(quiet))
            print_published(sent, as_json, quiet, computed(sent.report, plan))
            return
        saved = apply_plan(planned, target, how)
        checked = check(saved.path)
        done = None
        if repo is not None and checked.ok:
            done = push_folder(
                saved.path,
                repo,
                check=False,
                fresh=not resume,
                progress=advance,
                notice=tell(quiet),
            )
    if not as_json:
        if not quiet:
            print_report(saved.report)
        click.echo(str(saved.path))
        click.echo(str(checked), err=True, nl=bool(checked))
    result = outcome(saved) | checked.to_json()
    if done is not None:
        print_published(done, as_json, quiet, result)
    elif as_json:
        click.echo(json.dumps(result, indent=2))
    if not checked.ok:
        raise click.exceptions.Exit(3)
