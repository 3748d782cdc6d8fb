"""``merge barrier``: the loss between two models, as they are and aligned."""

from __future__ import annotations

import json
from pathlib import Path

import click

import merge
from merge.aligning import METHODS
from merge.analysis.figure import check_picture

from .options import data_option, json_option, pickle_option, quiet_option, symmetry_options
from .progress import count_bar

__all__ = ["barrier_command"]


@click.command("barrier", epilog="Example: merge barrier run-a run-b --data digits.npz -o line.png")
@click.argument("first")
@click.argument("second")
@data_option
@click.option(
    "--aligned",
    type=click.Choice([*(m for m in METHODS if m != "transport"), "none"]),
    default="weight",
    show_default=True,
    help="How the second model is aligned for the other line.",
)
@symmetry_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="A picture: .png, .svg or .pdf.")
@click.option("--points", type=click.IntRange(min=3), default=25, show_default=True)
@click.option("--layers/--no-layers", default=True, help="Each layer's share of the barrier.")
@click.option(
    "--curvature/--no-curvature", default=True, help="What slopes and curvatures foretell."
)
@click.option("--batch", type=click.IntRange(min=1), help="Samples that are run at a time.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Samples at most, of the training part and of the test part each.",
)
@pickle_option
@json_option
@quiet_option
def barrier_command(
    first: str,
    second: str,
    data: str,
    aligned: str,
    symmetry: Path | None,
    keep: tuple[str, ...],
    out: Path | None,
    points: int,
    layers: bool,
    curvature: bool,
    batch: int | None,
    limit: int | None,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """The loss along the line from FIRST to SECOND, as they are and with SECOND aligned."""
    if out is not None:
        check_picture(out)
    with count_bar("batch", quiet=quiet) as advance:
        found = merge.barrier(
            merge.open(first, allow_pickle=allow_pickle),
            merge.open(second, allow_pickle=allow_pickle),
            data,
            aligned=None if aligned == "none" else aligned,
            symmetry=symmetry,
            keep=keep,
            points=points,
            layers=layers,
            curvature=curvature,
            batch=batch,
            limit=limit,
            progress=advance,
        )
    if out is not None:
        found.picture(out)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    click.echo(str(found))
    if out is not None:
        click.echo(str(out))
