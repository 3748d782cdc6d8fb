"""``merge finish``: put together what several machines computed."""

from __future__ import annotations

import json
from pathlib import Path

import click

from merge import ranks

from .options import json_option, quiet_option

__all__ = ["finish_command"]


@click.command("finish", epilog="Example: merge finish merged/")
@click.argument("out", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--replace", is_flag=True, help="Replace an output folder that is not empty.")
@json_option
@quiet_option
def finish_command(out: tuple[Path, ...], replace: bool, as_json: bool, quiet: bool) -> None:
    """Gather into OUT what each rank of `merge apply` computed for it.

    Checks that the ranks' ledgers cover the plan, and says which files are missing and whose they
    are. Files are renamed, not copied; needs neither the recipe nor the inputs.
    """
    done = [ranks.finish(folder, replace=replace) for folder in out]
    if as_json:
        rows = [{"output": str(g.path), "plan": g.plan, "ranks": g.ranks} for g in done]
        click.echo(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
        return
    for gathered in done:
        if not quiet and not gathered.ranks:
            click.echo(f"{gathered.path} was there already", err=True)
        click.echo(str(gathered.path))
