"""``merge regmean``: least squares on the inputs of each layer, from models and data at once."""

from __future__ import annotations

from pathlib import Path

import click

import merge
from merge import run

from .options import dtype_option, pickle_option, quiet_option, replace_option
from .progress import progress_bar

__all__ = ["regmean_command"]


@click.command(
    "regmean",
    epilog="Example: merge regmean math code --data math.jsonl --data code.jsonl -o merged",
)
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--data",
    "sets",
    multiple=True,
    required=True,
    help="Files or module:function (docs/data.md), once for each model in their order.",
)
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Where to save the result."
)
@click.option(
    "--sequential",
    is_flag=True,
    help="RegMean++: the inputs of a layer come through the layers merged before.",
)
@click.option(
    "--unit",
    type=click.Choice(["block", "layer"]),
    default="block",
    show_default=True,
    help="What --sequential merges at once.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=256, show_default=True, help="Of each model."
)
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.9, show_default=True)
@dtype_option
@click.option("--memory", metavar="SIZE", help="Bound of the buffers, such as 2GiB.")
@replace_option
@pickle_option
@quiet_option
def regmean_command(
    models: tuple[str, ...],
    sets: tuple[str, ...],
    out: Path,
    sequential: bool,
    unit: str,
    samples: int,
    alpha: float,
    dtype: str | None,
    memory: str | None,
    replace: bool,
    allow_pickle: bool,
    quiet: bool,
) -> None:
    """Merge MODELS so that each linear layer answers as each model's does on its own data.

    `merge statistics` and the method regmean do the same in two steps, with Gram matrices that can
    be used again.
    """
    if len(sets) != len(models):
        raise click.UsageError(f"{len(models)} models need as many --data, not {len(sets)}")
    opened = [merge.open(m, allow_pickle=allow_pickle) for m in models]
    if sequential:
        done = 0

        def tell(name: str) -> None:
            nonlocal done
            done += 1
            click.echo(f"{done:4} {name}", err=True)

        found = merge.regmean_plus_plus(
            opened,
            sets,
            unit=unit,
            samples=samples,
            alpha=alpha,
            progress=None if quiet else tell,
        )
    else:
        pairs = zip(opened, sets, strict=True)
        known = [merge.gather_statistics(m, d, samples=samples) for m, d in pairs]
        found = merge.regmean(opened, statistics=known, alpha=alpha)
    plan = (found if dtype is None else found.cast(dtype)).plan(memory=memory)
    run.check_target(plan, out)
    with progress_bar(plan.read_bytes + plan.write_bytes, quiet=quiet) as advance:
        run.save_plan(plan, out, run.WriteOptions(replace, progress=advance))
    click.echo(str(out))
