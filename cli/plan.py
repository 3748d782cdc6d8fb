"""``merge plan``: what a recipe would do, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from merge import run

from .options import json_option, work_options

__all__ = ["plan_command"]


@click.command("plan", epilog="Example: merge plan recipe.yml --tensors")
@click.argument("recipe", type=click.Path(path_type=Path))
@work_options
@click.option("--tensors", is_flag=True, help="Every output tensor with its formula.")
@json_option
def plan_command(recipe: Path, tensors: bool, as_json: bool, **work: Any) -> None:
    """What RECIPE would read, write and hold; refuses what cannot work. Reads headers only."""
    plan = run.plan_recipe(recipe, **work)
    data = plan.to_json(tensors=tensors)
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(str(plan))
    if tensors:
        for letter, source in data["sources"].items():
            click.echo(f"  {letter} = {source}")
        for step in data["steps"]:
            shape = "x".join(map(str, step["shape"])) or "scalar"
            click.echo(f"  {step['tensor']}  {step['dtype']} {shape}\n      = {step['formula']}")
