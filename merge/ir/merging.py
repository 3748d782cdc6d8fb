"""Apply a merge method to checkpoints: one expression per tensor, nothing computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge.errors import MergeError, PlanError, RecipeError
from merge.ir.checkpoint import Aligned, Checkpoint, align_names, combine, same, short
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
) -> Checkpoint:
    """``method`` over ``models``, tensor by tensor.

    A ``delta`` method works on differences: weights are taken relative to ``base``, deltas are
    used as they are, and the base, if given, is added back. A ``weight`` method works on the
    models themselves; one whose base is its first operand finds it there, put by the caller. An
    ``either`` method is of the first kind with a base and of the second without.
    statistics: one checkpoint for each model, for methods that take them.
    Config, tokenizer and other side files come from the base, else from the first model.
    """
    everyone = [*([base] if base is not None else []), *models]
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
    aligned = align_names([*everyone, *statistics])
    under = base if relative else None
    for name in aligned.names:
        parts = [_operand(aligned, name, m, under) for m in models]
        known = [aligned.expr(s, name) for s in statistics]
        try:
            tensors[name] = _one(method, name, parts, known, arguments(name), aligned, seed)
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
        dropped=aligned.dropped,
        notes=aligned.notes,
        roots=aligned.roots,
    )


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
    chosen = method.variant(operands[0].shape, arguments)
    taken = {k: v for k, v in arguments.items() if k in chosen.takes}
    if chosen.coefficients and chosen.measure is None:
        known = {"count": len(operands)} if "count" in chosen.injected else {}
        return combine(name, list(zip(chosen.function(**taken, **known), operands, strict=True)))
    return Apply(
        chosen,
        (*operands, *statistics),
        tuple(sorted(taken.items())),
        aligned.tied.get(name, name),
        seed,
        len(operands),
    )
