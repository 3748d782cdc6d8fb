"""The library's front door: open, merge by a method, run a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, get_args

from merge import methods, run
from merge.applying import apply_plan, plan_recipe
from merge.checkpoint import open_checkpoint
from merge.errors import RecipeError, hint
from merge.families.reconcile import followed, reconcile
from merge.families.vocabulary import lookup_tables
from merge.given import by_names, several
from merge.ir.align import Missing
from merge.ir.checkpoint import Checkpoint
from merge.ir.merging import merge_checkpoints
from merge.learning import soup
from merge.learning.score import Score
from merge.learning.soup import Soup, Trial
from merge.steps import RecipeSteps

__all__ = [
    "MergeFunction",
    "apply",
    "average",
    "greedy_soup",
    "load_recipe",
    "method_function",
    "open",
    "push",
]


class MergeFunction(Protocol):
    """``merge.<method>``: a lazy merge by that method."""

    def __call__(
        self,
        models: Mapping[str, object] | Sequence[object],
        *,
        base: object = None,
        statistics: Mapping[str, object] | Sequence[object] = (),
        seed: int = 0,
        missing: Missing = "error",
        **parameters: object,
    ) -> Checkpoint: ...


def open(source: object, *, allow_pickle: bool = False) -> Checkpoint:
    """A lazy checkpoint; only headers are read.

    source: a folder of transformers, sentence-transformers, diffusers, timm or open_clip, a
    ``.safetensors`` file, a state dict, a ``torch.nn.Module``, or a checkpoint. allow_pickle: read
    torch's pickles too (``pytorch_model.bin``, ``.pt``, ``.ckpt``), by its weights-only reader: it
    runs no code, but holes were found in it before. Raises SourceError for what is missing or
    unsound.
    """
    return open_checkpoint(source, allow_pickle=allow_pickle)


def method_function(name: str) -> MergeFunction:
    """The function ``merge.<name>``; RecipeError when there is no such method."""
    method = methods.get(name)

    def function(
        models: Mapping[str, object] | Sequence[object],
        *,
        base: object = None,
        statistics: Mapping[str, object] | Sequence[object] = (),
        seed: int = 0,
        missing: Missing = "error",
        **parameters: object,
    ) -> Checkpoint:
        _check_missing(missing)
        given_models, names = several(models)
        own, _ = several(by_names(statistics or (), names, "statistics"), "statistics")
        parameters = {k: by_names(v, names, k) for k, v in parameters.items()}
        opened = [open_checkpoint(m) for m in given_models]
        known = [open_checkpoint(s) for s in own]
        root = None if base is None else open_checkpoint(base)
        order = list(range(len(opened)))
        if method.base == "first operand" and root is not None:
            listed = [i for i in order if opened[i].same_as(root)]
            if not listed:
                opened.insert(0, root)
                order = list(range(len(opened)))
            else:  # it stands first among the operands, with the values that were given for it
                order = [listed[0], *(i for i in order if i != listed[0])]
        given = {k.rstrip("_"): v for k, v in parameters.items()}
        bound = method.bind(len(opened), given)
        for spec in method.parameters.values():
            if spec.per_model:
                bound[spec.argument] = tuple(bound[spec.argument][i] for i in order)
        operands = [opened[i] for i in order]
        apart = known if method.statistic is not None else []
        beside = [] if apart else known
        inputs = reconcile([*([] if root is None else [root]), *operands, *beside])
        if root is not None:
            root = inputs.pop(0)
        known = [
            *inputs[len(operands) :],
            *(followed(s, o, n) for s, o, n in zip(apart, operands, inputs, strict=False)),
        ]
        operands = inputs[: len(operands)]
        tables = lookup_tables(operands) if method.variants else ()
        return merge_checkpoints(
            method, operands, root, lambda _: bound, seed, known, tables=tables, missing=missing
        )

    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{method.doc}\n\nmodels: checkpoints, or anything `merge.open` takes, as a list or by\n"
        "name. base: likewise one. statistics: likewise, one for each model, where the method\n"
        "takes them. A per-model parameter is one value for all models, or one for each, in their\n"
        "order or by name. missing: what becomes of tensors that not every model has: error, base\n"
        "(the first one's), or skip."
    )
    return function


def _check_missing(word: str) -> None:
    known = get_args(Missing)
    if word not in known:
        raise RecipeError(
            "the value of 'missing' is no known word",
            key="missing",
            found=repr(word),
            expected=f"one of {', '.join(known)}",
            do=hint(word, known),
        )


def average(models: Mapping[str, object] | Sequence[object]) -> Checkpoint:
    """The plain mean of models, such as the last checkpoints of a training run."""
    return method_function("linear")(models, weight=1.0)


def greedy_soup(
    models: Mapping[str, object] | Sequence[object],
    score: Score,
    *,
    progress: Callable[[Trial], None] | None = None,
) -> Soup:
    """The greedy soup (Wortsman et al. 2022): average those models that make the average better.

    models: anything `merge.open` takes. score: from a checkpoint, not yet computed, to a number,
    higher is better; called 2 n - 1 times. progress: called with each trial. The soup never scores
    less than the best single model.
    """
    opened = [open_checkpoint(m) for m in several(models)[0]]
    if opened:
        opened = reconcile(opened)
    return soup.greedy_soup(opened, score, progress=progress)


def load_recipe(
    path: str | Path, *, seed: int | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """The checkpoint that a recipe file describes, not yet computed."""
    from merge.recipe.compile import compile_recipe
    from merge.recipe.read import read_recipe

    opener = partial(open_checkpoint, allow_pickle=allow_pickle)
    recipe = read_recipe(path)
    return compile_recipe(recipe, opener, seed=seed, steps=RecipeSteps()).checkpoint


def apply(
    path: str | Path,
    out: str | Path,
    *,
    seed: int | None = None,
    missing: Missing | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    shard_size: int | str = "5GB",
    card: bool = True,
    licence: str | None = None,
    replace: bool = False,
    fresh: bool = False,
    allow_pickle: bool = False,
    copy_code: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Run the recipe file ``path`` into the folder ``out``: what `merge apply` does.

    missing: goes before the recipe's key of that name. card: with a README.md, a model card.
    licence: the Hub's identifier of the result's licence, where the inputs' cards do not settle it.
    allow_pickle: as for `open`. copy_code: copy the programs that came with the model, such as
    modeling_x.py, into the output. progress: called with bytes read and written since the last
    call.
    """
    made = plan_recipe(
        path,
        seed=seed,
        missing=missing,
        memory=memory,
        threads=threads,
        device=device,
        shard_size=shard_size,
        card=card,
        licence=licence,
        allow_pickle=allow_pickle,
        copy_code=copy_code,
        out=out,
        fresh=fresh,
    )
    how = run.WriteOptions(replace, fresh, progress=progress)
    return apply_plan(made, Path(out), how).path


def push(
    folder: str | Path,
    repo: str,
    *,
    branch: str = "main",
    create_pr: bool = False,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    fresh: bool = False,
) -> str:
    """Publish a finished folder as ``repo`` (owner/name) on the Hub; the address of its page.

    The folder is checked as by `verify`, and SourceError raised if it is not sound. What an earlier
    run has sent is not sent again, unless ``fresh``. The rest is as for `Checkpoint.push_to_hub`.
    """
    from merge.publishing import Target, open_target
    from merge.publishing_folder import push_folder

    target = Target(repo, branch, create_pr, private, commit_message, token)
    return push_folder(Path(folder), open_target(target), fresh=fresh).url
