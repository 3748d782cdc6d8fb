"""``merge pleas`` and ``merge zip``: networks made one by units that are alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import merge
from merge.parting import BY, COSTS

from .options import (
    json_option,
    memory_option,
    pickle_option,
    quiet_option,
    replace_option,
    symmetry_options,
    together,
)

__all__ = ["pleas_command", "zip_command"]

_saved_options = together(
    symmetry_options,
    memory_option,
    replace_option,
    pickle_option,
    json_option,
    quiet_option,
)
_out_option = click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make."
)
_samples_option = click.option(
    "--samples", default=2048, show_default=True, help="Examples of the data at most."
)


@click.command("pleas", epilog="Example: merge pleas A B -o both --budget 1.2 --data texts.jsonl")
@click.argument("first")
@click.argument("second")
@_out_option
@click.option(
    "--budget", default=1.0, show_default=True, metavar="TIMES", help="Of one model's size, 1 to 2."
)
@click.option("--by", type=click.Choice(BY), default="weights", help="What units are matched by.")
@click.option("--count", type=click.Choice(COSTS), default="parameters", help="Of the budget.")
@click.option("--ratio", "ratios", type=float, help="Share of units apart, instead of a budget.")
@click.option("--data", help="What the models are run on, as for `merge barrier`.")
@click.option(
    "--least-squares/--no-least-squares",
    default=None,
    help="Fit linear maps to what both models gave. [default: with --data]",
)
@click.option(
    "--sequential/--together",
    default=True,
    help="Fit layers one by one to what comes into them, or all in one pass. [sequential]",
)
@_samples_option
@click.option("--ridge", default=1e-4, show_default=True, help="Of least squares, relative.")
@_saved_options
def pleas_command(
    first: str,
    second: str,
    out: Path,
    memory: str | None,
    replace: bool,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Merge FIRST and SECOND in part: what is alike becomes one, the rest stays side by side.

    How much stays is chosen for each group of units, so that the result is within the budget.
    """
    a, b = (merge.open(m, allow_pickle=allow_pickle) for m in (first, second))
    made = merge.pleas(a, b, progress=_told(quiet), **how)
    _saved(made, out, memory, replace, as_json, quiet)


@click.command("zip", epilog="Example: merge zip A B -o zipped --data texts.jsonl")
@click.argument("models", nargs=-1, required=True)
@_out_option
@click.option("--data", required=True, help="What models are run on, as for `merge barrier`.")
@click.option("--ratio", type=float, help="Share of all units joined away. [to one model's width]")
@click.option(
    "--factor", type=float, help="On likenesses of joined units, at each join. [0.3]", default=None
)
@click.option(
    "--inside", type=float, help="Joins within a model, as a share of its part. [1]", default=None
)
@_samples_option
@_saved_options
def zip_command(
    models: tuple[str, ...],
    out: Path,
    data: str,
    memory: str | None,
    replace: bool,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Make MODELS of different tasks one: units that answer alike are joined, within and across.

    All of the networks is zipped; `merge.zip_models` also stops at a layer and keeps their heads.
    """
    opened = [merge.open(m, allow_pickle=allow_pickle) for m in models]
    given = {key: value for key, value in how.items() if value is not None}
    made = merge.zip_models(opened, data, progress=_told(quiet), **given)
    _saved(made, out, memory, replace, as_json, quiet)


def _told(quiet: bool) -> Any:
    return None if quiet else lambda said: click.echo(said, err=True)


def _saved(
    made: merge.PartialMerge | merge.Zipped,
    out: Path,
    memory: str | None,
    replace: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Save what was made and say what it is."""
    saved = made.save(out, memory=memory, replace=replace)
    if as_json:
        click.echo(json.dumps({"output": str(saved), **made.to_json()}, indent=2))
        return
    if not quiet:
        click.echo(str(made), err=True)
    click.echo(str(saved))
