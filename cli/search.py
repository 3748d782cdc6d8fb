"""``merge soup`` and ``merge sweep``: let a score choose what to merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import merge
from merge import run
from merge.score import score_by_command

from .options import json_option, pickle_option, quiet_option, score_options, work_options

__all__ = ["soup_command", "sweep_command"]


@click.command("soup", epilog="Example: merge soup run-* -o soup/ --score 'python score.py {}'")
@click.argument("models", nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where to save the soup.")
@score_options
@pickle_option
@json_option
@quiet_option
def soup_command(
    models: tuple[str, ...],
    out: Path | None,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
    **scoring: Any,
) -> None:
    """The greedy soup of MODELS: average those that make the average score higher."""
    opened = [merge.open(m, allow_pickle=allow_pickle) for m in models]

    def tell(trial: merge.Trial) -> None:
        if not quiet:
            names = " + ".join(models[i] for i in trial.members)
            click.echo(
                f"{trial.score:12.6g}  {'' if trial.taken else '(left out) '}{names}", err=True
            )

    found = merge.greedy_soup(opened, score_by_command(**scoring), progress=tell)
    if out is not None:
        found.checkpoint.save(out)
    members = [models[i] for i in found.members]
    if as_json:
        trials = [[[models[i] for i in t.members], t.score] for t in found.trials]
        data = {"members": members, "score": found.score, "trials": trials, "output": _text(out)}
        click.echo(json.dumps(data, indent=2))
        return
    click.echo("\n".join(members))


@click.command(
    "sweep", epilog="Example: merge sweep wise.yml parameters.alpha 0:1:0.05 --score ./score.sh"
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("key")
@click.argument("values", callback=lambda _context, _option, text: _numbers(text))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where to save the best.")
@score_options
@work_options
@json_option
@quiet_option
def sweep_command(
    recipe: Path,
    key: str,
    values: list[float],
    out: Path | None,
    command: str,
    scratch: Path | None,
    minimize: bool,
    as_json: bool,
    quiet: bool,
    settings: tuple[str, ...],
    **work: Any,
) -> None:
    """Score RECIPE with each of VALUES for its KEY, such as parameters.t; keep the best.

    VALUES are numbers divided by commas, or first:last:step.
    """

    def tell(value: float, score: float) -> None:
        if not quiet:
            click.echo(f"{key}={value:<10g} {score:12.6g}", err=True)

    def make(value: float) -> merge.Checkpoint:
        planned = run.plan_recipe(recipe, settings=(*settings, f"{key}={value!r}"), **work)
        return planned.compiled.checkpoint

    engine = {k: work[k] for k in ("memory", "threads", "device")}
    score = score_by_command(command, scratch, minimize=minimize, **engine)
    found = merge.sweep(make, values, score, progress=tell)
    if out is not None:
        chosen = run.plan_recipe(recipe, settings=(*settings, f"{key}={found.value!r}"), **work)
        run.apply_plan(chosen, out)
    if as_json:
        data = {
            "key": key,
            "value": found.value,
            "score": found.score,
            "curve": found.curve,
            "output": _text(out),
        }
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(f"{key}={found.value!r}")


def _text(out: Path | None) -> str | None:
    return None if out is None else str(out)


def _numbers(text: str) -> list[float]:
    """``0:1:0.25`` or ``0.1,0.3``."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (float(part) for part in text.split(":"))
        count = int((last - first) / step + 1e-9) + 1
        return [round(first + i * step, 12) for i in range(count)]
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"{text!r} is neither 0.1,0.2 nor first:last:step") from None
