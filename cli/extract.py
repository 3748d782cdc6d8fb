"""``merge extract-lora``: the difference of a model to its base as a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from merge.checkpoint import open_checkpoint
from merge.extraction import extract_lora
from merge.write.target import check_overlap, check_unused

from .options import (
    device_option,
    json_option,
    memory_option,
    pickle_option,
    quiet_option,
    replace_option,
    threads_option,
)
from .progress import progress_bar

__all__ = ["extract_command"]

_RANK = 32


@click.command("extract-lora", epilog="Example: merge extract-lora tuned --base base -o lora")
@click.argument("model")
@click.option("--base", required=True, metavar="MODEL", help="What the model was trained from.")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The adapter's folder."
)
@click.option(
    "--rank", type=click.IntRange(min=1), help=f"Of a matrix, at most. [default: {_RANK}]"
)
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the squares of all differences that is kept at least; ranks follow.",
)
@click.option("--full", is_flag=True, help="As high ranks as it takes to keep everything.")
@click.option(
    "--embeddings",
    type=click.Choice(["full", "lora", "skip"]),
    help="Changed embeddings: stored whole, as factors, or not. [default: whole]",
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Only modules like this.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No modules like this.")
@click.option("--dtype", help="Storage type of the adapter. [default: float32 factors]")
@device_option
@memory_option
@threads_option
@replace_option
@click.option("--card/--no-card", default=True, help="With a README.md.")
@pickle_option
@json_option
@quiet_option
def extract_command(
    model: str,
    base: str,
    out: Path,
    rank: int | None,
    energy: float | None,
    full: bool,
    replace: bool,
    card: bool,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """The difference of MODEL to its base as a LoRA adapter, which peft loads.

    Patterns are regular expressions over the names of modules. Prints what is kept of each module.
    """
    if full and (rank is not None or energy is not None):
        raise click.UsageError("--full keeps everything: leave --rank and --energy out")
    if rank is None and energy is None and not full:
        rank = _RANK
    tuned, root = (open_checkpoint(m, allow_pickle=allow_pickle) for m in (model, base))
    check_overlap(out, (*tuned.roots, *root.roots))
    check_unused(out, replace=replace)
    total = sum(spec.nbytes for spec in tuned.values() if len(spec.shape) > 1)
    with progress_bar(total, quiet=quiet) as advance:
        made = extract_lora(tuned, root, rank=rank, energy=energy, progress=advance, **settings)
    path = made.save(out, card=card, replace=replace)
    if as_json:
        click.echo(json.dumps({"output": str(path), **made.report.to_json()}, indent=2))
        return
    if not quiet:
        click.echo(str(made.report), err=True)
    click.echo(str(path))
