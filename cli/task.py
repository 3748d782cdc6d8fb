"""``merge task``: what single tasks of a learned merge have for themselves, and their models."""

from __future__ import annotations

import json
from pathlib import Path

import click

import merge
from merge.errors import RecipeError
from merge.task_files import tasks_in

from .options import dtype_option, json_option, memory_option, replace_option, token_option

__all__ = ["task_command"]


@click.command("task", epilog="Example: merge task merged/ topics -o topics-merged")
@click.argument("model")
@click.argument("task", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to make.")
@dtype_option
@memory_option
@replace_option
@token_option
@json_option
def task_command(
    model: str,
    task: str | None,
    out: Path | None,
    dtype: str | None,
    memory: str | None,
    replace: bool,
    as_json: bool,
) -> None:
    """The tasks of MODEL, a learned merge, that have tensors of their own; or the model of one.

    With TASK and -o its whole model is written, the merged tensors with the task's own over them,
    to be loaded by itself. A task with a correction has none: `merge.load_task` in Python runs it.
    """
    if task is not None and out is not None:
        saved = merge.open_task(model, task).save(out, dtype=dtype, memory=memory, replace=replace)
        click.echo(json.dumps({"output": str(saved)}) if as_json else str(saved))
        return
    if out is not None:
        raise RecipeError("it is not said whose model", key="TASK", do="name a task before -o")
    every = tasks_in(model)
    found = [own for own in every if task in (None, own.task)]
    if task is not None and not found:
        merge.open_task(model, task)  # which tells the nearest name
    if as_json:
        told = [{"task": o.task, "learned": list(o.learned), "layer": o.layer} for o in found]
        click.echo(json.dumps(told, indent=2))
        return
    for own in found:
        behind = "" if own.layer is None else f", a correction behind {own.layer or 'the network'}"
        click.echo(f"{own.task}: {', '.join(own.learned)}{behind}")
