"""``merge inspect``: what a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from merge.axes import axes_of, explained
from merge.inspect import inspect, tensor_rows
from merge.plan.model import human_bytes

from .options import download_option, json_option, pickle_option, token_option

__all__ = ["inspect_command"]


@click.command("inspect", epilog="Example: merge inspect path/to/model --tensors")
@click.argument("model")
@click.option("--tensors", is_flag=True, help="Every tensor.")
@click.option("--axes", is_flag=True, help="What each axis counts, and what may be exchanged.")
@click.option(
    "--explain", metavar="NAME", help="Why an axis of this tensor, or a group, is frozen."
)
@click.option("--symmetry", metavar="FILE", help="A symmetry spec to go by, for the two above.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@pickle_option
@token_option
@download_option
@json_option
def inspect_command(
    model: str,
    tensors: bool,
    axes: bool,
    explain: str | None,
    symmetry: str | None,
    revision: str | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """What MODEL is and is made of: family, layers, roles, sizes. Reads headers only."""
    model = model if revision is None else f"{model}@{revision}"
    if explain is not None:
        lines = explained(model, explain, spec=symmetry)
        click.echo(json.dumps(lines, indent=2) if as_json else "\n".join(lines))
        return
    if axes:
        _print_axes(axes_of(model, spec=symmetry), as_json)
        return
    data = inspect(model, allow_pickle=allow_pickle)
    if tensors:
        data["tensor_list"] = tensor_rows(model, allow_pickle=allow_pickle)
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(model)
    click.echo(f"  family      {data['family'] or 'unknown (no config says it)'}")
    click.echo(f"  tensors     {data['tensors']}, {data['parameters']:,} parameters")
    click.echo(f"  size        {human_bytes(data['bytes'])} in {len(data['files'])} files")
    if set(data["components"]) != {""}:
        parts = ", ".join(f"{n} {name or '(top)'}" for name, n in data["components"].items())
        click.echo(f"  components  {parts}")
    kinds = ", ".join(f"{n} {name}" for name, n in data["dtypes"].items())
    click.echo(f"  types       {kinds}")
    for how, count in data["quantised"].items():
        click.echo(f"  quantised   {count} {how}, read as the numbers that they stand for")
    for stack, count in data["stacks"].items():
        click.echo(f"  layers      {count} in {stack or '(top)'}")
    for label, text in _facts(data):
        click.echo(f"  {label:11} {text}")
    click.echo(f"  side files  {', '.join(data['side_files']) or 'none'}")
    for row in data.get("tensor_list", []):
        shape = "x".join(map(str, row["shape"])) or "scalar"
        click.echo(f"    {row['name']}  {row['dtype']} {shape}  {row['role']}")


def _print_axes(data: dict[str, Any], as_json: bool) -> None:
    """Groups with sizes, moves and what they depend on; then each pattern with its axes."""
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    click.echo("groups (P permute, S signs, D scale, R rotate)")
    for row in data["groups"]:
        per = f" for each index of {', '.join(row['per'])}" if row["per"] else ""
        flags = row["flags"] or "frozen"
        why = f": {row['reason']}" if row["reason"] else ""
        click.echo(f"  {row['group']:12} {row['size']:6} {flags:6} x {row['count']}{per}{why}")
    click.echo("tensors")
    for row in data["tensors"]:
        click.echo(f"  {row['pattern']}  {', '.join(row['axes']) or 'no axes'}  x {row['tensors']}")
    for word, text in data["frozen"].items():
        click.echo(f"  _{word}: {text}")
    for note in data["notes"]:
        click.echo(f"note: {note}")


def _facts(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is known of the model from its names, a line each."""
    if len(data["sub_models"]) > 1:
        parts = (f"{p['tensors']} {name}" for name, p in data["sub_models"].items())
        yield "parts", ", ".join(parts)
    yield "roles", ", ".join(f"{count} {role}" for role, count in data["roles"].items())
    tokens = data["vocabulary"]
    if tokens["rows"]:
        rows = " or ".join(map(str, tokens["rows"]))
        yield "vocabulary", f"{rows} rows in {', '.join(tokens['tensors'])}"
    for name, other in data["tied"].items():
        yield "tied", f"{name} is {other}"
    if data["experts"]["layout"]:
        yield "experts", f"{data['experts']['count']}, stored {data['experts']['layout']}"
    for path, count in data["adapters"].items():
        yield "adapter", f"{path} changes {count} tensors"
