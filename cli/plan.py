"""``merge plan``: what a recipe would do, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from merge.applying import plan_recipe
from merge.recipe.explain import Explanation

from .options import json_option, token_option, work_options

__all__ = ["plan_command"]


@click.command("plan", epilog="Example: merge plan recipe.yml --explain lm_head.weight")
@click.argument("recipe", type=click.Path(path_type=Path))
@work_options
@click.option("--align", is_flag=True, help="Compute alignments and repairs too; reads weights.")
@click.option("--tensors", is_flag=True, help="Every output tensor with its formula.")
@click.option("--explain", metavar="TENSOR", help="Which value each parameter takes, and why.")
@token_option
@json_option
def plan_command(
    recipe: Path, align: bool, tensors: bool, explain: str | None, as_json: bool, **work: Any
) -> None:
    """What RECIPE would read, write and hold; refuses what cannot work. Reads headers only."""
    planned = plan_recipe(recipe, compute=align, **work)
    if explain is not None:
        _print_reasons(planned.compiled.explain(explain), as_json)
        return
    data = planned.plan.to_json(tensors=tensors)
    data["stages"] = {str(folder): plan.to_json() for folder, plan in planned.stages}
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    for folder, plan in planned.stages:
        click.echo(f"{folder}: {plan}")
    click.echo(str(planned.plan))
    if tensors:
        for letter, source in data["sources"].items():
            click.echo(f"  {letter} = {source}")
        for step in data["steps"]:
            shape = "x".join(map(str, step["shape"])) or "scalar"
            click.echo(f"  {step['tensor']}  {step['dtype']} {shape}\n      = {step['formula']}")


def _print_reasons(found: Sequence[Explanation], as_json: bool) -> None:
    """Stage by stage, the result's first: operands, then one line a parameter."""
    if as_json:
        click.echo(json.dumps([asdict(e) for e in found], indent=2))
        return
    for each in found:
        stage = f" in stage {each.stage}" if each.stage else ""
        click.echo(f"{each.tensor}{stage}: {each.method} at depth {each.depth:.4g}")
        click.echo(f"  of {', '.join(each.inputs)}" + (f" over {each.base}" if each.base else ""))
        rows = [
            (f"{r.parameter} {r.model or ''}".strip(), f"{r.value}", r.why) for r in each.reasons
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        for name, value, why in rows:
            click.echo(f"  {name:{widths[0]}} = {value:{widths[1]}}  {why}")
