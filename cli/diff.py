"""``merge diff``: how far apart two models are, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import click

import merge
from merge.analysis.difference import Distance
from merge.analysis.figure import check_picture

from .options import (
    download_option,
    json_option,
    memory_option,
    pickle_option,
    plot_option,
    threads_option,
    token_option,
)

__all__ = ["diff_command"]


@click.command("diff", epilog="Example: merge diff org/base org/tuned --plot diff.png")
@click.argument("a")
@click.argument("b")
@click.option("--base", metavar="MODEL", help="Cosine and signs are of the changes from it.")
@click.option("--tensors", is_flag=True, help="A row for every tensor, not for every layer.")
@plot_option
@memory_option
@threads_option
@pickle_option
@token_option
@download_option
@json_option
def diff_command(
    a: str,
    b: str,
    base: str | None,
    tensors: bool,
    plot: Path | None,
    memory: str | None,
    threads: int | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """How far B is from A: distance, cosine and agreement of signs of each layer.

    Each tensor is read once, a piece at a time; models may be folders or on the Hub.
    """
    if plot is not None:
        check_picture(plot)
    found = merge.diff(a, b, base=base, memory=memory, threads=threads, allow_pickle=allow_pickle)
    if plot is not None:
        found.plot(plot)
    if as_json:
        click.echo(json.dumps(found.to_json(tensors=tensors), indent=2))
        return
    rows = [*(found.tensors if tensors else found.layers), found.whole]
    width = max(len(row.name) for row in rows)
    click.echo(f"{'':{width}}  {'distance':>10}  relative   cosine    signs    equal")
    for row in rows:
        click.echo(f"{row.name:{width}}  {_cells(row)}")
    if base is not None:
        click.echo(f"cosine and signs are of the changes from {found.base}", err=True)
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    for name, why in found.left_out.items():
        click.echo(f"left out: {name}, {why}", err=True)


def _cells(row: Distance) -> str:
    parts = (f"{v:8.4f}" if v == v else f"{'-':>8}" for v in (row.cosine, row.signs, row.equal))
    relative = f"{row.relative:8.4f}" if row.relative == row.relative else f"{'-':>8}"
    return f"{row.distance:10.4g}  {relative} {' '.join(parts)}"
