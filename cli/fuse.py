"""``merge fuse``: networks of different widths and depths made one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import merge
from merge.carrying import BY, FEATURES, RESIDUALS
from merge.transport.depth import DEPTHS
from merge.transport.features import METRICS
from merge.transport.plans import MARGINALS

from .options import (
    json_option,
    memory_option,
    pickle_option,
    quiet_option,
    replace_option,
    symmetry_options,
    threads_option,
    together,
)
from .progress import progress_bar

__all__ = ["fuse_command", "given_options", "transport_options"]

transport_options = together(
    click.option("--by", type=click.Choice(BY), help="What units are compared by. [weights]"),
    click.option(
        "--regularisation", type=float, metavar="R", help="Of soft plans, such as 0.05. [0: exact]"
    ),
    click.option("--marginals", type=click.Choice(MARGINALS), help="Weight of units. [uniform]"),
    click.option("--metric", type=click.Choice(METRICS), help="Between two units. [squared]"),
    click.option("--features", type=click.Choice(FEATURES), help="Which weights. [both]"),
    click.option("--sweeps", type=click.IntRange(min=1), help="Over all groups, at most. [4]"),
    click.option(
        "--residual",
        type=click.Choice(RESIDUALS),
        help="Which places of a residual stream count, by activations. [mean]",
    ),
)

_WORDS = ("by", "regularisation", "marginals", "metric", "features", "sweeps", "residual")


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options of transport that were given."""
    return {w: options[w] for w in _WORDS if options.get(w) is not None}


@click.command("fuse", epilog="Example: merge fuse wide narrow --into narrow -o fused")
@click.argument("models", nargs=-1, required=True)
@click.option("--into", metavar="MODEL", help="Whose widths and order are taken. [the first]")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where to save the result.")
@click.option("--weights", metavar="W,W,...", help="One for each model. [equal]")
@transport_options
@click.option("--data", multiple=True, help="For --by activations; one for all, or one for each.")
@click.option(
    "--depth",
    type=click.Choice(DEPTHS),
    help="What layers are compared by where depths differ. [count, or cka with --data]",
)
@symmetry_options
@click.option("--report", is_flag=True, help="Print how alike the models' units are.")
@memory_option
@threads_option
@replace_option
@pickle_option
@json_option
@quiet_option
def fuse_command(
    models: tuple[str, ...],
    into: str | None,
    out: Path | None,
    weights: str | None,
    data: tuple[str, ...],
    depth: str | None,
    symmetry: Path | None,
    keep: tuple[str, ...],
    report: bool,
    memory: str | None,
    threads: int | None,
    replace: bool,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """The mean of MODELS, each carried over into the widths and coordinates of one of them.

    Without -o only the report is made.
    """
    names = list(dict.fromkeys([*models, *([into] if into else [])]))
    opened = {n: merge.open(n, allow_pickle=allow_pickle) for n in names}
    total = sum(s.nbytes for c in opened.values() for s in c.values())
    with progress_bar(total, quiet=quiet) as advance:
        settings: dict[str, Any] = given_options(options)
        if depth is not None:
            settings["depth"] = depth
        fused = merge.fuse(
            [opened[m] for m in models],
            into=None if into is None else opened[into],
            weights=None if weights is None else _numbers(weights),
            data=list(data) or None,
            symmetry=symmetry,
            keep=keep,
            progress=advance,
            **settings,
        )
    reports = merge.fusion_reports(fused)
    if out is not None:
        fused.save(out, memory=memory, threads=threads, replace=replace)
    if as_json:
        output = None if out is None else str(out)
        told = [r.to_json() for r in reports]
        click.echo(json.dumps({"output": output, "reports": told}, indent=2))
        return
    if report or out is None:
        for one in reports:
            click.echo(str(one))
    if out is not None:
        click.echo(str(out))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 0.7,0.3") from None
