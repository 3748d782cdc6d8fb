"""``merge statistics``: what data says of a model's weights, for methods that need it."""

from __future__ import annotations

import json
from pathlib import Path

import click

import merge
from merge import run
from merge.gathering import KINDS, LABELS

from .options import data_option, json_option, pickle_option, quiet_option, replace_option
from .progress import progress_bar

__all__ = ["statistics_command"]


@click.command("statistics", epilog="Example: merge statistics math --data math.jsonl -o math-gram")
@click.argument("model")
@data_option
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Where they are written."
)
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default="gram",
    show_default=True,
    help="For the method regmean: of the inputs of layers; or for the method fisher.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=256, show_default=True, help="Examples."
)
@click.option(
    "--labels",
    type=click.Choice(LABELS),
    default="model",
    show_default=True,
    help="Of fisher: those that the model expects, or those of the data.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of labels that are drawn.")
@click.option(
    "--memory", metavar="SIZE", default="1GiB", show_default=True, help="Bound of the sums."
)
@replace_option
@pickle_option
@json_option
@quiet_option
def statistics_command(
    model: str,
    data: str,
    out: Path,
    kind: str,
    samples: int,
    labels: str,
    seed: int,
    memory: str,
    replace: bool,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """What DATA says of MODEL's weights, in a folder that a recipe names under `statistics`."""
    opened = merge.open(model, allow_pickle=allow_pickle)
    found = merge.gather_statistics(
        opened, data, kind=kind, samples=samples, memory=memory, labels=labels, seed=seed
    )
    plan = run.plan(found, run.PlanOptions(card=False))
    if not quiet:
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
    with progress_bar(plan.read_bytes + plan.write_bytes, quiet=quiet) as advance:
        run.check_target(plan, out)
        run.save_plan(plan, out, run.WriteOptions(replace, progress=advance))
    if as_json:
        facts = {"output": str(out), "kind": kind, "tensors": len(found), "bytes": plan.write_bytes}
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(str(out))
