"""``merge interpolate``: between an old model and a new one, by accuracy and flips."""

from __future__ import annotations

import json
from pathlib import Path

import click

import merge

from .options import data_option, json_option, pickle_option, replace_option

__all__ = ["interpolate_command"]


@click.command(
    "interpolate",
    epilog="Example: merge interpolate old new --data test.npz --max-flips 0.01 -o out",
)
@click.argument("old")
@click.argument("new")
@data_option
@click.option("--points", type=click.IntRange(min=2), default=21, show_default=True)
@click.option(
    "--max-flips",
    type=click.FloatRange(0, 1),
    help="Share of examples that OLD has right and the result may have wrong.",
)
@click.option(
    "--statistics",
    nargs=2,
    metavar="OLD NEW",
    help="Fisher information of both: weights move by what they know.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where the chosen is saved.")
@replace_option
@pickle_option
@json_option
def interpolate_command(
    old: str,
    new: str,
    data: str,
    points: int,
    max_flips: float | None,
    statistics: tuple[str, str] | None,
    out: Path | None,
    replace: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """The most accurate model between OLD and NEW, and the answers that it gets wrong anew."""
    found = merge.interpolate(
        merge.open(old, allow_pickle=allow_pickle),
        merge.open(new, allow_pickle=allow_pickle),
        data,
        alphas=[i / (points - 1) for i in range(points)],
        max_flips=max_flips,
        statistics=statistics or (),
    )
    if out is not None:
        found.checkpoint.save(out, replace=replace)
    if as_json:
        output = None if out is None else str(out)
        click.echo(json.dumps({"output": output, **found.report.to_json()}, indent=2))
        return
    click.echo(str(found.report))
    if out is not None:
        click.echo(str(out))
