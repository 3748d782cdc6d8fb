"""``merge verify``: check a finished folder."""

from __future__ import annotations

from pathlib import Path

import click

from merge.plan.model import human_bytes
from merge.verify import to_json, verify

from .options import json_option

__all__ = ["verify_command"]


@click.command("verify", epilog="Example: merge verify merged/")
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def verify_command(out: Path, as_json: bool) -> None:
    """Check OUT: headers, index, config, and every byte against its manifest.

    Exit code 3 if it is not sound.
    """
    result = verify(out)
    if as_json:
        click.echo(to_json(result))
    else:
        for problem in result.problems:
            click.echo(problem)
        proof = (
            f"{human_bytes(result.bytes_hashed)} hashed, plan {result.plan[:16]}"
            if result.plan
            else "no manifest: structure only, no bytes"
        )
        verdict = "sound" if result.ok else f"{len(result.problems)} problems"
        click.echo(f"{out}: {verdict}: {result.tensors} tensors, {proof}")
    if not result.ok:
        raise click.exceptions.Exit(3)
