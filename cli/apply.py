"""``merge apply``: run a recipe."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import click

from merge import run
from merge.plan.model import Plan, human_bytes

from .options import json_option, quiet_option, smoke_options, work_options
from .progress import progress_bar
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
    smoke: bool,
    smoke_against: Path | None,
    as_json: bool,
    quiet: bool,
    **work: Any,
) -> None:
    """Run RECIPE into the folder OUT (named after the recipe if left out).

    OUT appears whole or not at all. After an interruption the same command resumes. With --smoke
    the exit code is 3 when OUT, which stays, does not load or gives no numbers.
    """
    check = smoke_check(smoke, smoke_against)
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
    total = sum(_total(p) for p in (plan, *(p for _, p in planned.stages)))
    with progress_bar(total, quiet=quiet) as advance:
        saved = run.apply_plan(
            planned,
            target,
            replace=replace,
            fresh=not resume,
            non_finite="allow" if allow_non_finite else "error",
            progress=advance,
        )
    report = saved.report
    checked = check(saved.path)
    if as_json:
        click.echo(json.dumps(_result(saved) | checked.to_json(), indent=2))
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


def _total(plan: Plan) -> int:
    return plan.read_bytes + sum(s.output.nbytes for s in plan.steps)


def _result(saved: run.Saved) -> dict[str, object]:
    report = saved.report
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "output": str(saved.path),
        "plan": saved.plan.hash,
        "already_complete": report is None,
        "seconds": report.seconds if report else 0.0,
        "bytes_read": report.bytes_read if report else 0,
        "bytes_written": report.bytes_written if report else 0,
        "resumed_chunks": report.resumed_chunks if report else 0,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "notes": list(saved.plan.notes),
    }
