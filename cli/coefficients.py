"""``merge coefficients``: what was learned, by layer and expert."""

from __future__ import annotations

import json
from pathlib import Path

import click

from merge.analysis.figure import check_picture
from merge.coefficients import by_layer, read_coefficients

from .options import json_option, plot_option

__all__ = ["coefficients_command"]


@click.command("coefficients", epilog="Example: merge coefficients merged/ --plot heat.png")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--blocks", is_flag=True, help="Each block that was learned, not each layer.")
@plot_option
@json_option
def coefficients_command(file: Path, blocks: bool, plot: Path | None, as_json: bool) -> None:
    """The learned coefficients in FILE, a coefficients.json or an output that has one.

    Each row is a layer, each column an expert, each number the mean over the layer's tensors.
    """
    if plot is not None:
        check_picture(plot)
    found = by_layer(read_coefficients(file), blocks=blocks)
    if plot is not None:
        found.picture(plot)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))
