"""Tasks from a line of text: arrays, texts, or a function of one's own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from merge.analysis.models import arrays, texts
from merge.analysis.named import called, is_function
from merge.analysis.task import Task
from merge.errors import RecipeError, SourceError

__all__ = ["limited", "open_task"]


def open_task(
    data: str,
    folder: str | Path | None = None,
    *,
    batch: int | None = None,
    limit: int | None = None,
) -> Task:
    """The task that ``data`` names.

    ``module:function``: what the function returns, called without arguments; the module is looked
    for in the current folder too. ``x.npz``: arrays x and y, and x_test and y_test or else the last
    fifth of them, for the classifier in ``folder``. ``x.jsonl`` (with a key "text") or ``x.txt``:
    texts for the language model in ``folder``. Classifiers and language models are those of
    transformers. batch: samples in a batch (64 of arrays, 8 windows of text by default), not for a
    function, which makes its own. limit: samples of each part, of training and of test, at most; a
    function's batches stay whole. RecipeError for what is none of these, SourceError for what
    cannot be read.
    """
    for key, number in (("batch", batch), ("limit", limit)):
        if number is not None and number < 1:
            raise RecipeError(
                "there is nothing to judge by", key=key, found=number, expected=">= 1"
            )
    suffix = Path(data).suffix.lower()
    if suffix in (".npz", ".jsonl", ".txt"):
        if not Path(data).is_file():
            raise SourceError("there is no such data", file=data)
        if folder is None or not (Path(folder) / "config.json").is_file():
            raise RecipeError(
                "this kind of data needs a model of transformers to run it in",
                found="no folder with a config.json" if folder is None else str(folder),
                do="give the folder of such a model, or data as module:function",
            )
        if suffix == ".npz":
            return arrays(Path(data), Path(folder), batch, limit)
        return texts(Path(data), Path(folder), batch, limit)
    if is_function(data):
        return limited(_own(data), batch, limit)
    raise RecipeError(
        "this is no data that is known here",
        found=repr(data),
        expected="a .npz of x and y, a .jsonl or .txt of texts, or module:function",
    )


def _own(text: str) -> Task:
    made = called(text)
    if not isinstance(made, Task):
        raise SourceError(
            "the function does not return a task",
            function=text,
            found=type(made).__name__,
            expected="merge.Task(module, criterion, train=[(inputs, target), ...])",
        )
    return made


def limited(task: Task, batch: int | None, limit: int | None) -> Task:
    """A task whose batches were made elsewhere, with about ``limit`` samples of each part."""
    if batch is not None:
        raise RecipeError(
            "the size of these batches is not chosen here",
            key="batch",
            found=batch,
            do="make the batches as large as they shall be where they are made",
        )
    if limit is None:
        return task
    parts = []
    for batches in (task.train, task.test):
        counts = itertools.accumulate((task.samples(b) for b in batches), initial=0)
        parts.append([b for b, before in zip(batches, counts, strict=False) if before < limit])
    return replace(task, train=parts[0], test=parts[1])
