"""``merge soup``, ``merge sweep`` and ``merge search``: let a score choose what to merge."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

import merge
from merge.analysis.figure import check_picture
from merge.applying import apply_plan, plan_recipe
from merge.errors import MergeError
from merge.learning.ranges import parse_range
from merge.learning.search import METHODS
from merge.score import score_by_command

from .options import (
    device_option,
    json_option,
    memory_option,
    pickle_option,
    plot_option,
    quiet_option,
    score_options,
    threads_option,
    work_options,
)
from .progress import trial_lines

__all__ = ["search_command", "soup_command", "sweep_command"]


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
        planned = plan_recipe(recipe, settings=(*settings, f"{key}={value!r}"), **work)
        return planned.compiled.checkpoint

    engine = {k: work[k] for k in ("memory", "threads", "device")}
    score = score_by_command(command, scratch, minimize=minimize, **engine)
    found = merge.sweep(make, values, score, progress=tell)
    if out is not None:
        chosen = plan_recipe(recipe, settings=(*settings, f"{key}={found.value!r}"), **work)
        apply_plan(chosen, out)
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
        found = parse_range(text)
    except MergeError:
        found = None
    if found is None or found.count is None:
        raise click.BadParameter(f"{text!r} is neither 0.1,0.2 nor first:last:step")
    return list(found.grid())


@click.command(
    "search",
    epilog="Example: merge search tsv.yml --over lambda=0.5:3:0.25 --data 'v.csv?label=label'",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--over",
    multiple=True,
    metavar="KEY=RANGE",
    help="A parameter and its values: 0:2, 0:2:0.1, 0.1,0.5 or {low: 0, high: 1, each: model}."
    " Repeatable. [default: those of the recipe's tune:]",
)
@click.option("--data", multiple=True, metavar="[TASK=]DATA", help="Judge by; see docs/data.md.")
@click.option("--score", metavar="COMMAND", help="Prints the score of the model in the folder {}.")
@click.option("--minimize", is_flag=True, help="Lower is better, as the command prints it.")
@click.option("--metric", type=click.Choice(["accuracy", "loss"]), help="On data.")
@click.option("--method", type=click.Choice(METHODS), help="How values are chosen.")
@click.option("--trials", type=click.IntRange(min=1), help="Values to be tried at most.")
@click.option("--population", type=click.IntRange(min=2), help="Of cmaes.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the search.")
@click.option(
    "--study",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keeps what was tried; the same command takes it up. [default: RECIPE.study.jsonl]",
)
@click.option("--resume/--fresh", default=True, help="Take up the study, or start over.")
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the recipe with the best values, after each better trial.",
)
@plot_option
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As for apply.")
@device_option
@memory_option
@threads_option
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where candidates for a command are written and removed.",
)
@pickle_option
@json_option
@quiet_option
def search_command(
    recipe: Path,
    over: tuple[str, ...],
    data: tuple[str, ...],
    study: Path | None,
    resume: bool,
    save: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    minimize: bool,
    **options: Any,
) -> None:
    """The values of RECIPE's parameters that score best, on data or by a command.

    What is not given here is taken from the recipe's own tune:. The values that the recipe has are
    tried first, so that the result is never worse. After an interruption the same command goes on.
    """
    if plot is not None:
        check_picture(plot)
    found = merge.tune(
        recipe,
        over=_pairs(over) or None,
        data=_tasks(data) or None,
        minimize=minimize or None,
        study=study or Path(f"{recipe.stem}.study.jsonl"),
        fresh=not resume,
        better=save,
        progress=None if quiet else trial_lines(),
        **options,
    )
    if plot is not None:
        found.picture(plot)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    click.echo(str(found))
    click.echo(f"best: {found.told()}", err=True)
    for setting in found.settings:
        click.echo(f"--set {shlex.quote(setting)}")


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not KEY=RANGE")
        found[key] = value
    return found


def _tasks(texts: tuple[str, ...]) -> dict[str, str]:
    """``TASK=DATA`` by task; data alone by itself."""
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        named = bool(equals) and name.isidentifier()
        found[name if named else ""] = path if named else text
    return found
