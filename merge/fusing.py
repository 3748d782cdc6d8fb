"""Fuse networks that differ in widths: each carried over into the coordinates of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal
from weakref import WeakKeyDictionary

from merge.alignment.report import Report
from merge.carrying import Transport, couple_checkpoints
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError
from merge.ir.checkpoint import Checkpoint, linear_combination

__all__ = ["fuse", "fusion_reports"]


_reports: WeakKeyDictionary[Checkpoint, tuple[Report, ...]] = WeakKeyDictionary()


def fuse(
    models: Sequence[object],
    into: object = None,
    weights: Sequence[float] | None = None,
    *,
    by: Literal["weights", "activations"] = "weights",
    regularisation: float = 0.0,
    marginals: Literal["uniform", "l1", "l2"] = "uniform",
    metric: Literal["squared", "euclidean", "cosine"] = "squared",
    features: Literal["both", "incoming"] = "both",
    sweeps: int = 4,
    residual: str = "mean",
    depth: Literal["count", "cka", "wasserstein"] | None = None,
    symmetry: object = None,
    data: object = None,
    keep: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Checkpoint:
    """The mean of networks after each is carried over into the widths and coordinates of ``into``.

    Units are coupled by optimal transport; a plan moves what is written to its units by one map and
    what is read from them by another, so that a wider or narrower network computes the same where
    units are copies. The result is lazy; the search reads all networks now.

    models: anything `merge.open` takes, of one architecture; widths may differ. into: one of the
    models, or another one that lends its widths and order only; by default the first. weights: one
    for each model, by default equal; they are divided by their sum. by: ``weights``, or
    ``activations`` on ``data``. regularisation: of the plans' entropy, relative to the largest
    cost; 0 for exact ones. marginals: how much each unit weighs: alike or by the ``l1`` or ``l2``
    norm of what comes in. metric, features: how far apart two units are, and by which weights.
    sweeps: over all groups, at most. residual: which places a residual stream is coupled by (by
    activations): ``mean``, ``no_resid``, ``only_resid``, ``weighted_scalar``, ``weighted_matrix``.
    depth: what layers are compared by where their numbers differ: ``count`` (of units, and where
    they stand), or with data ``cka``, its default, or ``wasserstein``. symmetry: a symmetry spec,
    by default that of the models' type, or of the module that runs the data; of ``into`` where
    depths differ. data: a `merge.Task`, or
    text as for ``merge barrier --data``; where modules differ, one for each model. keep: groups
    that stay.

    Example::

        fused = merge.fuse(["wide", "narrow"], into="narrow")
        fused.save("both")
    """
    how = Transport.of(
        by=by, regularisation=regularisation, marginals=marginals, metric=metric,
        features=features, sweeps=sweeps, residual=residual, depth=depth,
        symmetry=symmetry, keep=keep,
    )  # fmt: skip
    opened = [open_checkpoint(m) for m in models]
    if not opened:
        raise RecipeError("there is nothing to fuse", key="models", expected="at least one model")
    place = _place(into, models, opened)
    target = open_checkpoint(into) if place is None else opened[place]
    shares = _shares(weights, len(opened))
    terms: list[tuple[float, Checkpoint]] = []
    reports = []
    for k, (share, model) in enumerate(zip(shares, opened, strict=True)):
        if k == place:
            terms.insert(0, (share, target))
            continue
        given = _data_of(data, k, len(opened), place)
        found = couple_checkpoints(target, model, replace(how, data=given), progress)
        terms.append((share, found.move(model)))
        reports.append(found.match.report)
    kept = [(s, c) for s, c in terms if s]
    fused = kept[0][1] if len(kept) == 1 and kept[0][0] == 1 else linear_combination(kept)
    result = replace(
        fused,
        side=target.side,
        label=f"fused({', '.join(c.label for c in opened)})",
        roots=tuple(dict.fromkeys(r for c in (target, *opened) for r in c.roots)),
    )
    _reports[result] = tuple(reports)
    return result


def fusion_reports(checkpoint: Checkpoint) -> tuple[Report, ...]:
    """What `merge.fuse` found for each model that it carried over, in order; PlanError for a
    checkpoint of other origin."""
    found = _reports.get(checkpoint)
    if found is None:
        raise PlanError(
            "there is no report of a fusion for this checkpoint",
            model=checkpoint.label,
            do="give the checkpoint that merge.fuse returned, before anything was made of it",
        )
    return found


def _place(into: object, models: Sequence[object], opened: Sequence[Checkpoint]) -> int | None:
    """Which of the models the others are fused into; None where it is another one."""
    if into is None:
        return 0
    for k, model in enumerate(models):
        if model is into or opened[k] is into:
            return k
    target = open_checkpoint(into)
    return next((k for k, c in enumerate(opened) if c.same_as(target)), None)


def _data_of(data: object, k: int, count: int, target: int | None) -> object:
    """The data of model k and of the target: one for all, or one for each."""
    if not isinstance(data, list | tuple):
        return data
    wanted = count + (target is None)
    if len(data) == 1:
        return data[0]
    if len(data) != wanted:
        raise RecipeError(
            "there is not one source of data for each model",
            key="data",
            found=len(data),
            expected=f"1, or {wanted}"
            + ("" if target is not None else ", the last for the model that is fused into"),
        )
    return (data[k], data[-1 if target is None else target])


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    total = float(sum(weights))
    if len(weights) != count or not total:
        raise RecipeError(
            "the weights of a fusion do not fit its models",
            key="weights",
            found=", ".join(f"{w:g}" for w in weights),
            expected=f"{count} numbers whose sum is not 0",
        )
    return [w / total for w in weights]
