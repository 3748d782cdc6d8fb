"""``merge finish``: put together what several machines computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from merge import publishing_shares, ranks

from .options import json_option, quiet_option, replace_option
from .push import open_repo, print_published, push_options, tell

__all__ = ["finish_command"]


@click.command("finish", epilog="Example: merge finish merged/")
@click.argument("out", type=click.Path(path_type=Path), nargs=-1, required=True)
@replace_option
@click.option("--push", metavar="REPO", help="Commit what the ranks have sent to this repo.")
@push_options
@json_option
@quiet_option
def finish_command(
    out: tuple[Path, ...], replace: bool, push: str | None, as_json: bool, quiet: bool, **how: Any
) -> None:
    """Gather into OUT what each rank of `merge apply` computed for it.

    Checks that the ranks' ledgers cover the plan, and says which files are missing and whose they
    are. Files are renamed, not copied; needs neither the recipe nor the inputs. With --push, what
    the ranks have sent is committed: the model appears in the repo.
    """
    if push is not None:
        if len(out) > 1:
            raise click.UsageError("--push is of one OUT")
        repo = open_repo(push, how)
        sent = publishing_shares.publish_shares(out[0], repo, notice=tell(quiet))
        print_published(sent, as_json, quiet)
        return
    done = [ranks.finish(folder, replace=replace) for folder in out]
    if as_json:
        rows = [{"output": str(g.path), "plan": g.plan, "ranks": g.ranks} for g in done]
        click.echo(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
        return
    for gathered in done:
        if not quiet and not gathered.ranks:
            click.echo(f"{gathered.path} was there already", err=True)
        click.echo(str(gathered.path))
