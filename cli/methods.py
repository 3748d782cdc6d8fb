"""``merge methods`` and ``merge schema``: what can be written in a recipe."""

from __future__ import annotations

import json
from typing import Any

import click

from merge import methods

from .options import json_option

__all__ = ["methods_command", "schema_command"]


@click.command("methods", epilog="Example: merge methods ties")
@click.argument("name", required=False)
@json_option
def methods_command(name: str | None, as_json: bool) -> None:
    """The merge methods, or one method's formula, parameters and recipe."""
    if name is None:
        registry = methods.registry().values()
        if as_json:
            click.echo(json.dumps([_describe(m) for m in registry], indent=2))
            return
        width = max(len(m.name) for m in registry)
        for m in registry:
            click.echo(f"{m.name:{width}}  {m.summary}")
        return
    found = methods.get(name)
    if as_json:
        click.echo(json.dumps(_describe(found), indent=2))
        return
    click.echo(f"{found.name}\n\n{found.doc}\n\nParameters:")
    for row in _describe(found)["parameters"] or [None]:
        click.echo(
            "  none"
            if row is None
            else f"  {row['key']}: {row['type']}{' per model' if row['per_model'] else ''},"
            f" {row['range']}, " + ("required" if row["required"] else f"default {row['default']}")
        )


def _describe(method: methods.Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "space": method.space,
        "base": method.base,
        "models": {"least": method.inputs[0], "most": method.inputs[1]},
        "random": method.random,
        "parameters": [
            {
                "key": p.key,
                "type": p.type.__name__,
                "per_model": p.per_model,
                "range": str(p.range) if p.type in (int, float) else p.type.__name__,
                "required": p.required,
                "default": p.default,
            }
            for p in method.parameters.values()
        ],
        "doc": method.doc,
    }


@click.command("schema", epilog="Example: merge schema > recipe.schema.json")
def schema_command() -> None:
    """The recipe's JSON schema, for editors."""
    from merge.recipe.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
