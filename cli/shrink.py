"""``merge shrink``: a model with fewer blocks and narrower layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import merge
from merge.errors import RecipeError
from merge.resizing import IMPORTANCE

from .options import (
    dtype_option,
    json_option,
    memory_option,
    pickle_option,
    quiet_option,
    replace_option,
)

__all__ = ["shrink_command"]


@click.command(
    "shrink",
    epilog="Example: merge shrink model -o small --layers 5 --width intermediate_size=1024"
    " --data texts.jsonl",
)
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--layers", type=click.IntRange(min=1), help="How many layers to keep.")
@click.option("--keep-layers", metavar="I,J,...", help="Which layers to keep, counted from 0.")
@click.option(
    "--width",
    "widths",
    multiple=True,
    metavar="KEY=SIZE",
    help="A new size by its key in config.json. Repeatable.",
)
@click.option("--data", help="What the model is run on, as for `merge barrier`.")
@click.option(
    "--importance",
    type=click.Choice(IMPORTANCE),
    help="What units are judged by. [default: activations with --data, else weights]",
)
@click.option(
    "--least-squares/--no-least-squares",
    default=None,
    help="Fit what is left to what the model gave before. [default: with --data]",
)
@click.option("--samples", default=256, show_default=True, help="Examples of the data at most.")
@click.option("--ridge", default=1e-4, show_default=True, help="Of least squares, relative.")
@dtype_option
@memory_option
@replace_option
@pickle_option
@json_option
@quiet_option
def shrink_command(
    model: str,
    out: Path,
    layers: int | None,
    keep_layers: str | None,
    widths: tuple[str, ...],
    dtype: str | None,
    memory: str | None,
    replace: bool,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Make MODEL smaller: leave out blocks, cut units, and make up for both by least squares.

    Without --data blocks go from the middle and units by the size of their weights. With --data the
    least influential blocks go first, and what reads fewer units, or comes before a block that
    goes, is fitted to what it gave before.
    """
    if layers is not None and keep_layers is not None:
        raise RecipeError("both --layers and --keep-layers are given", do="leave one of them out")
    kept = layers if keep_layers is None else _numbers(keep_layers)
    made = merge.shrink(
        merge.open(model, allow_pickle=allow_pickle),
        widths=dict(map(_width, widths)) or None,
        layers=kept,
        progress=None if quiet else lambda said: click.echo(said, err=True),
        **how,
    )
    saved = made.save(out, dtype=dtype, memory=memory, replace=replace)
    if as_json:
        click.echo(json.dumps({"output": str(saved), "notes": list(made.notes)}, indent=2))
        return
    if not quiet:
        for note in made.notes:
            click.echo(f"note: {note}", err=True)
    click.echo(str(saved))


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(
            "the layers to keep are no numbers",
            key="--keep-layers",
            found=text,
            expected="such as 0,1,4,5",
        ) from None


def _width(text: str) -> tuple[str, int]:
    key, _, size = text.partition("=")
    if not key or not size.isdecimal():
        raise RecipeError(
            "a width is not as it should be", key="--width", found=text, expected="KEY=SIZE"
        )
    return key, int(size)
