"""``merge align``: bring one model into the coordinates of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import merge
from merge.aligning import METHODS, ROTATIONS

from .fuse import given_options, transport_options
from .options import (
    json_option,
    memory_option,
    pickle_option,
    quiet_option,
    replace_option,
    symmetry_options,
    threads_option,
)
from .progress import progress_bar

__all__ = ["align_command"]


@click.command("align", epilog="Example: merge align run-b --to run-a -o run-b-aligned")
@click.argument("model")
@click.option("--to", "target", required=True, metavar="MODEL", help="Whose coordinates are taken.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where to save the result.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="weight",
    show_default=True,
    help="By the weights, by activations on data, by the loss half way, or by transport.",
)
@click.option("--data", help="Files or module:function (docs/data.md), for the other methods.")
@click.option(
    "--rotate",
    multiple=True,
    type=click.Choice(ROTATIONS),
    help="Rotate too: values in heads, rotary phases, the residual stream. Repeatable.",
)
@click.option("--signed", is_flag=True, help="Change signs too, where the symmetry allows it.")
@symmetry_options
@transport_options
@click.option(
    "--report",
    is_flag=True,
    help="Print what moved and how alike the models are; with --data also unit by unit.",
)
@memory_option
@threads_option
@replace_option
@pickle_option
@json_option
@quiet_option
def align_command(
    model: str,
    target: str,
    out: Path | None,
    method: str,
    data: str | None,
    rotate: tuple[str, ...],
    signed: bool,
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
    """MODEL in the coordinates of another: the same function, its units moved to their likes.

    Without -o only the report is made. The output's tensors are MODEL's in another order, to the
    bit, unless they are rotated, or carried over by transport, whose options are those from --by
    to --residual.
    """
    moving, fixed = (merge.open(m, allow_pickle=allow_pickle) for m in (model, target))
    total = sum(s.nbytes for c in (moving, fixed) for s in c.values())
    with progress_bar(total, quiet=quiet) as advance:
        found = merge.align(
            moving,
            to=fixed,
            method=method,
            symmetry=symmetry,
            data=data,
            keep=keep,
            signed=signed,
            rotate=rotate,
            transport=given_options(options),
            progress=advance,
        )
    told = merge.alignment_report(found)
    alike = _alike(moving, fixed, data, symmetry) if report and data is not None else ()
    if out is not None:
        found.save(out, memory=memory, threads=threads, replace=replace)
    if as_json:
        output = None if out is None else str(out)
        shown: dict[str, Any] = {"output": output, "report": told.to_json()}
        if alike:
            shown["convergence"] = [c.to_json() for c in alike]
        click.echo(json.dumps(shown, indent=2))
        return
    if report or out is None:
        click.echo(str(told))
        for group in alike:
            click.echo(str(group))
    if out is not None:
        click.echo(str(out))


def _alike(first: object, second: object, data: str, symmetry: Path | None) -> tuple[Any, ...]:
    """What data says of both models' units."""
    return merge.convergence(second, first, data, symmetry=symmetry)
