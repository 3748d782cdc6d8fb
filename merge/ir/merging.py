"""Apply a merge method to checkpoints: one expression per tensor, nothing computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge.errors import MergeError, PlanError, RecipeError
from merge.ir.align import Aligned, Missing, align_names, short, some
from merge.ir.checkpoint import Checkpoint, combine, same
from merge.ir.expr import Apply, Expr, MethodLike

__all__ = ["merge_checkpoints"]

Arguments = Callable[[str], Mapping[str, Any]]
"""From an output tensor's name to the method's bound arguments for that tensor."""


def merge_checkpoints(
    method: MethodLike,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    arguments: Arguments,
    seed: int = 0,
    statistics: Sequence[Checkpoint] = (),
    tables: Collection[str] = (),
    missing: Missing = "error",
    donor: Checkpoint | None = None,
) -> Checkpoint:
    """``method`` over ``models``, tensor by tensor.

    A ``delta`` method works on differences: weights are taken relative to ``base``, deltas are
    used as they are, and the base, if given, is added back. A ``weight`` method works on the
    models themselves; one whose base is its first operand finds it there, put by the caller. An
    ``either`` method is of the first kind with a base and of the second without.
    statistics: one checkpoint for each model, for methods that take them; those of inputs have
    names of the models' tensors, but not all of them.
    tables: tensors whose rows are tokens, not features; empty where nobody knows which.
    missing: what becomes of tensors that not all have. donor: whose names are the result's, and
    whose config, tokenizer and other side files: by default the base, else the first model.
    """
    everyone = [c for c in (donor, base, *models) if c is not None]
    if not everyone:
        raise PlanError(f"method {method.name!r} was given no models", expected="at least one")
    method.check_inputs(len(models))
    _check_statistics(method, models, statistics)
    relative = method.space == "delta" or (method.space == "either" and base is not None)
    if relative:
        _require_base(method, models, base)
    elif len({c.space for c in models}) > 1:
        raise PlanError(
            f"method {method.name!r} needs all models in one space",
            found=", ".join(f"{c.label}: {c.space}" for c in models),
            expected="all weights, or all deltas",
        )
    donor = everyone[0]
    tensors: dict[str, Expr] = {}
    apart = statistics if method.statistic is not None else ()  # in names and shapes of their own
    aligned = align_names([*everyone, *(() if apart else statistics)], missing)
    _check_used(aligned, apart)
    under = base if relative else None
    taken: list[str] = []  # from the donor, as they are
    for name in aligned.names:
        who: Sequence[int] = range(len(models))
        if name in aligned.partial:
            beside = () if apart else statistics
            who = _holders(method, aligned, name, models, beside, under, missing)
            if not who:
                tensors[name] = aligned.expr(donor, name)
                taken.append(name)
                continue
        parts = [_operand(aligned, name, models[i], under) for i in who]
        try:
            if apart:
                known = _of_inputs(method, name, parts[0].shape, [apart[i] for i in who])
            else:
                known = [aligned.expr(statistics[i], name) for i in who] if statistics else []
            given = {k: _of(v, who, len(models)) for k, v in arguments(name).items()}
            table = name in tables if tables else None
            chosen = method.variant(parts[0].shape, given, table)
            if apart and not known:
                chosen = method.unknown
            tensors[name] = _one(chosen, name, parts, known, given, aligned, seed)
        except MergeError as error:
            raise error.at(tensor=name) from None
        if under is not None:
            tensors[name] = combine(name, [(1.0, aligned.expr(under, name)), (1.0, tensors[name])])
    mass = models[0].mass
    if relative:
        mass = 0.0 if base is None else base.mass
    label = f"{method.name}({', '.join(short(m.label) for m in models)})"
    dtypes = {c.out_dtype for c in everyone}
    return replace(
        donor,
        tensors=tensors,
        label=label,
        mass=mass,
        out_dtype=dtypes.pop() if len(dtypes) == 1 else None,
        tied=aligned.tied,
        dropped={**aligned.dropped, **_unused(aligned, donor, models, taken)},
        notes=(*aligned.notes, *_said(aligned, donor, taken)),
        roots=aligned.roots,
    )


def _holders(
    method: MethodLike,
    aligned: Aligned,
    name: str,
    models: Sequence[Checkpoint],
    statistics: Sequence[Checkpoint],
    under: Checkpoint | None,
    missing: Missing,
) -> Sequence[int]:
    """Which models a tensor that not all have is merged among; none where the donor's is taken.

    Where the method does not take so many, as slerp does not take one, it is the donor's too.
    """
    if missing == "base" or (under is not None and not aligned.holds(under, name)):
        return ()
    has = [aligned.holds(m, name) for m in models]
    if statistics:
        has = [h and aligned.holds(s, name) for h, s in zip(has, statistics, strict=True)]
    who = [i for i, h in enumerate(has) if h]
    try:
        method.check_inputs(len(who))
    except RecipeError:
        return ()
    return who


def _of(value: Any, who: Sequence[int], count: int) -> Any:
    """A per-model parameter for some of ``count`` models, any other as it is."""
    if len(who) == count or not isinstance(value, tuple):
        return value
    return tuple(value[i] for i in who)


def _unused(
    aligned: Aligned, donor: Checkpoint, models: Sequence[Checkpoint], taken: Sequence[str]
) -> dict[str, str]:
    """Tensors of models in whose place the donor's is taken, with that for a reason."""
    why = f"not every model has it, and {short(donor.label)}'s is taken"
    others = [m for m in models if not m.same_as(donor)]
    return {n: why for n in taken if any(aligned.holds(m, n) for m in others)}


def _said(aligned: Aligned, donor: Checkpoint, taken: Sequence[str]) -> list[str]:
    """Notes on tensors that not every model has."""
    among = [n for n in aligned.names if n in aligned.partial and n not in set(taken)]
    label = short(donor.label)
    return [
        f"{len(names)} tensors that not every model has {how}: {some(names)}"
        for names, how in (
            (list(taken), f"are {label}'s as they are"),
            (among, "are merged among those that have them"),
        )
        if names
    ]


def _check_statistics(
    method: MethodLike, models: Sequence[Checkpoint], statistics: Sequence[Checkpoint]
) -> None:
    wanted = len(models) if method.statistics else 0
    if len(statistics) != wanted:
        raise RecipeError(
            f"method {method.name!r} needs a statistic of every model"
            if wanted
            else f"method {method.name!r} takes no statistics",
            key="statistics",
            found=f"{len(statistics)} of {len(models)}",
            expected=f"{wanted}",
            do=f"see `merge methods {method.name}`",
        )


def _check_used(aligned: Aligned, statistics: Sequence[Checkpoint]) -> None:
    """PlanError unless each of the statistics is of a tensor that is merged."""
    every = {*aligned.names, *aligned.dropped}
    for known in statistics:
        odd = [n for n in known.tensors if n not in every]
        if odd:
            raise PlanError(
                "a statistic is of a tensor that the models do not have",
                model=known.label,
                tensor=odd[0],
                found=f"{len(odd)} such tensors: {some(odd)}",
                expected="names of the models' weights",
                do="gather the statistics from these models: merge statistics MODEL --data DATA",
            )


def _of_inputs(
    method: MethodLike, name: str, shape: tuple[int, ...], statistics: Sequence[Checkpoint]
) -> list[Expr]:
    """The statistics of a weight's inputs, one for each model; none where no model has one."""
    known = [s.tensors[name] for s in statistics if name in s.tensors]
    if known and len(known) < len(statistics):
        lacking = next(s for s in statistics if name not in s.tensors)
        raise PlanError(
            "a tensor has a statistic in some models and not in others",
            model=lacking.label,
            found=f"{len(known)} of {len(statistics)}",
            do="gather the statistics of all models in the same way",
        )
    assert method.statistic is not None
    for expr in known:
        method.statistic(shape, expr.shape)
        if expr.shape != known[0].shape:
            raise PlanError(
                "the statistics of a tensor have different shapes",
                found=", ".join(str(list(e.shape)) for e in known),
                do="gather the statistics of all models in the same way",
            )
    return known


def _require_base(
    method: MethodLike, models: Sequence[Checkpoint], base: Checkpoint | None
) -> None:
    whole = [m.label for m in models if m.space != "delta"]
    if whole and base is None:
        raise PlanError(
            f"method {method.name!r} works on differences to a base, and no base was given",
            found=f"weights: {', '.join(whole)}",
            expected="a base model, or deltas",
            do="name the model that these were fine-tuned from: base_model in a recipe, base= here",
        )


def _operand(aligned: Aligned, name: str, model: Checkpoint, base: Checkpoint | None) -> Expr:
    expr = aligned.expr(model, name)
    if base is None or model.space == "delta":
        return expr
    return combine(name, [(1.0, expr), (-1.0, aligned.expr(base, name))])


def _one(
    method: MethodLike,
    name: str,
    operands: Sequence[Expr],
    statistics: Sequence[Expr],
    arguments: Mapping[str, Any],
    aligned: Aligned,
    seed: int,
) -> Expr:
    if any(e.dtype.kind != "float" for e in operands):
        return same(name, tuple(operands))
    taken = {k: v for k, v in arguments.items() if k in method.takes}
    if method.coefficients and method.measure is None:
        known = {"count": len(operands)} if "count" in method.injected else {}
        return combine(name, list(zip(method.function(**taken, **known), operands, strict=True)))
    return Apply(
        method,
        (*operands, *statistics),
        tuple(sorted(taken.items())),
        aligned.tied.get(name, name),
        seed,
        len(operands),
    )
