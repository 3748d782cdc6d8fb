"""``merge verify``: check a finished folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from merge.plan.model import human_bytes
from merge.verify import to_json, verify

from .options import json_option, smoke_options
from .smoke import smoke_check

__all__ = ["verify_command"]


@click.command("verify", epilog="Example: merge verify merged/")
@click.argument("out", type=click.Path(path_type=Path))
@smoke_options
@json_option
def verify_command(out: Path, smoke: bool, smoke_against: Path | None, as_json: bool) -> None:
    """Check OUT: headers, index, config, and every byte against its manifest.

    Exit code 3 if it is not sound, or with --smoke does not load or gives no numbers.
    """
    check = smoke_check(smoke, smoke_against)
    result = verify(out)
    checked = check(out)
    if as_json:
        click.echo(json.dumps(to_json(result) | checked.to_json(), indent=2))
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
        click.echo(str(checked), nl=bool(checked))
    if not (result.ok and checked.ok):
        raise click.exceptions.Exit(3)
