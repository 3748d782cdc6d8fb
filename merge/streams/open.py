"""Tasks from what a recipe or a command line says of data: examples, divided, in a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.analysis.named import called, is_function
from merge.analysis.task import Task
from merge.errors import MergeError, RecipeError, SourceError, told
from merge.streams import arrays, images, tables, texts
from merge.streams.batches import Batches, Collate
from merge.streams.examples import Example, divide, shuffled
from merge.streams.labels import Classes, classes_of
from merge.streams.models import Runner, logits_of, open_runner
from merge.streams.prototypes import put_prototypes
from merge.streams.spec import KINDS, PARTS, DataSpec, parse_data
from merge.streams.unlabelled import foretells, unlabelled

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["limited", "open_task"]


def open_task(
    data: str | Mapping[str, Any] | DataSpec,
    folder: str | Path | None = None,
    name: str = "",
    *,
    batch: int | None = None,
    limit: int | None = None,
) -> Task:
    """The task that ``data`` describes, run in the model of transformers in ``folder``.

    data: a path with options, a mapping or a spec (`DataSpec` says which). A ``module:function`` is
    called without arguments and returns a `Task`, or batches (inputs, target), or a mapping of
    such by part: adapt, train, validate, test. The module is looked for in the current folder
    too. batch, limit: go before those of ``data``; a function's batches stay whole. RecipeError for
    what is none of these, SourceError for what cannot be read; both name the task where it has a
    name.
    """
    for key, number in (("batch", batch), ("limit", limit)):
        if number is not None and number < 1:
            said = "there is nothing to judge by"
            raise RecipeError(said, key=key, found=number, expected=">= 1")
    spec = parse_data(data, name)
    spec = replace(spec, batch=batch or spec.batch, limit=limit or spec.limit)
    try:
        opened = _opened(spec, None if folder is None else Path(folder))
        return limited(opened, batch, spec.limit) if is_function(spec.path) else opened
    except MergeError as error:
        raise error.at(task=spec.name or None) from None


def _opened(spec: DataSpec, folder: Path | None) -> Task:
    path = Path(spec.path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        examples = _everywhere(spec, arrays.read_arrays)
        kind = "AutoModelForImageClassification"
        if examples[0].value.ndim < 3:
            kind = "AutoModelForSequenceClassification"
        runner = open_runner(spec, folder, kind)
        return _classifier(
            spec, runner, examples, lambda c: arrays.collated(c, spec.model is not None)
        )
    if suffix in tables.SUFFIXES:
        found = _everywhere(spec, lambda file, part: tables.read_table(file, spec, part))
        return _of_texts(spec, folder, found)
    if path.is_dir():
        examples = _everywhere(spec, images.list_pictures)
        runner = open_runner(spec, folder, "AutoModelForImageClassification")
        preprocess = images.preprocess_of(runner)
        return _classifier(
            spec,
            runner,
            examples,
            lambda c: images.pictured(preprocess, c, spec.model is not None),
        )
    if is_function(spec.path):
        return _own(spec, folder)
    if suffix in images.SUFFIXES or suffix or path.exists():
        said = "this is no data that is known here"
        raise RecipeError(said, found=repr(spec.path), expected=KINDS)
    raise SourceError("there is no such data", file=spec.path, expected=KINDS)


def _everywhere(spec: DataSpec, read: Callable[[Path, str | None], list[Example]]) -> list[Example]:
    """The examples of the main file, and of the parts that have files of their own.

    Where some have, the main file has no share in those.
    """
    own = {part: getattr(spec, part) for part in PARTS if getattr(spec, part) is not None}
    found = read(Path(spec.path), None)
    if own:
        found = [e for e in found if e.part not in own]
        rest = {p: s for p, s in spec.shares.items() if p not in own}
        total = sum(rest.values())
        shares = {p: s / total for p, s in rest.items()} if total else {}
        main = replace(spec, shares=shares, limit=None)
        found = [replace(e, part=p) for p, es in divide(found, main).items() for e in es]
    for part, file in own.items():
        found += read(Path(file), part)
    return found


# -- classifiers -----------------------------------------------------------------------------------
def _classifier(
    spec: DataSpec,
    runner: Runner,
    examples: Sequence[Example],
    collate: Callable[[Classes], Collate],
) -> Task:
    import torch

    if all(e.label is None for e in examples):
        return unlabelled(spec, runner, examples, collate({}))
    config = {} if spec.head else runner.config
    classes = classes_of(examples, spec, config)
    parts = divide(examples, spec)
    made = {p: _batches(spec, p, found, collate(classes)) for p, found in parts.items()}
    if spec.head is not None:
        put_prototypes(runner, made["train"])

    def loss(out: Any, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits_of(out), target)

    def right(out: Any, target: Tensor) -> float:
        return float((logits_of(out).argmax(-1) == target).float().mean())

    return _task(spec, runner, made, loss, right)


def _batches(spec: DataSpec, part: str, examples: Sequence[Example], collate: Collate) -> Batches:
    """In the order of the seed what is learnt from, as it comes what is judged by."""
    if part in ("adapt", "train"):
        examples = shuffled(examples, spec.seed)
    if part == "adapt":
        examples = [replace(e, label=None) for e in examples]
    return Batches(examples, spec.batch, collate, spec.name)


def _task(
    spec: DataSpec,
    runner: Runner,
    parts: Mapping[str, Sequence[Any]],
    loss: Callable[[Any, Any], Tensor],
    right: Callable[[Any, Any], float] | None,
    count: Callable[[tuple[Any, Any]], float] | None = None,
) -> Task:
    return Task(
        runner.module,
        loss,
        parts.get("train", ()),
        parts.get("test", ()),
        right,
        runner.load,
        count,
        name=spec.called,
        adapt=parts.get("adapt", ()),
        validate=parts.get("validate", ()),
        logits=logits_of,
    )


# -- texts -----------------------------------------------------------------------------------------
def _of_texts(spec: DataSpec, folder: Path | None, examples: Sequence[Example]) -> Task:
    if spec.label is not None:
        runner = open_runner(spec, folder, "AutoModelForSequenceClassification")
        tokenizer = texts.open_tokenizer(runner)
        return _classifier(
            spec, runner, examples, lambda c: texts.classified(tokenizer, runner, spec, c)
        )
    if spec.head is not None:
        raise RecipeError(
            "prototypes are of classes, and no label is named",
            key="label",
            file=spec.path,
            expected="label: the field with the label",
        )
    runner = open_runner(spec, folder, "AutoModelForCausalLM")
    tokenizer = texts.open_tokenizer(runner)
    if spec.positive is not None:
        return unlabelled(spec, runner, examples, texts.paired(tokenizer, runner, spec))
    if not foretells(runner.module):
        return unlabelled(spec, runner, examples, texts.classified(tokenizer, runner, spec, {}))
    divided = divide(examples, replace(spec, limit=None))
    parts = {p: texts.windows(es, tokenizer, spec)[: spec.limit] for p, es in divided.items()}
    if not parts["train"]:  # too few texts to be divided: one long one is a window or more
        parts = {"train": texts.windows(examples, tokenizer, spec)[: spec.limit]}
    if not parts["train"]:
        raise SourceError(
            "there is too little text",
            file=spec.path,
            expected=f"{spec.tokens} tokens or more",
        )
    collate = texts.windowed(tokenizer)
    made = {
        p: Batches(windows, min(spec.batch, 8), collate, spec.name) for p, windows in parts.items()
    }
    return _task(spec, runner, made, _own_loss, None, texts.to_be_found)


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


def _own_loss(out: Any, _target: Any) -> Tensor:
    if getattr(out, "loss", None) is None:
        raise SourceError(
            "the model gives no loss on this data",
            found=type(out).__name__,
            expected="a language model; or labels, for a classifier",
            do="take the model with the head that it was trained with",
        )
    found: Tensor = out.loss
    return found


# -- functions of the user's own -------------------------------------------------------------------
def _own(spec: DataSpec, folder: Path | None) -> Task:
    made = called(spec.path)
    if isinstance(made, Task):
        return made if made.name or not spec.name else replace(made, name=spec.name)
    given = made if isinstance(made, Mapping) else {"train": made}
    odd = next((p for p in given if p not in PARTS), None)
    if odd is not None or isinstance(made, str) or not hasattr(made, "__iter__"):
        raise SourceError(
            "the function does not return a task",
            function=spec.path,
            found=type(made).__name__ if odd is None else f"a part called {odd!r}",
            expected="merge.Task(...), batches of (inputs, target), or such batches by part:"
            f" {', '.join(PARTS)}",
        )
    parts = {p: _drawn(spec, batches) for p, batches in given.items()}
    if not any(parts.values()):
        raise SourceError("there is no data", function=spec.path, found="no batches")
    import torch

    runner = open_runner(spec, folder, "AutoModelForSequenceClassification")
    labelled = all(target is not None for p in parts if p != "adapt" for _, target in parts[p])
    if not labelled:
        return _task(spec, runner, parts, _own_loss, None)
    return _task(
        spec,
        runner,
        parts,
        lambda out, target: torch.nn.functional.cross_entropy(logits_of(out), target),
        lambda out, target: float((logits_of(out).argmax(-1) == target).float().mean()),
    )


def _drawn(spec: DataSpec, batches: Any) -> list[tuple[Any, Any]]:
    """All batches of a loader; what it raises names it."""
    found: list[tuple[Any, Any]] = []
    try:
        for batch in batches:
            pair = isinstance(batch, tuple | list) and len(batch) == 2
            found.append((batch[0], batch[1]) if pair else (batch, None))
    except MergeError as error:
        raise error.at(function=spec.path) from None
    except Exception as error:  # a loader of the user's may raise anything
        raise SourceError(
            "a loader of your own raised an error",
            function=spec.path,
            batch=len(found) + 1,
            found=told(error),
        ) from error
    return found
