"""Fuse networks that differ in widths: each carried over into the coordinates of one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from merge.alignment.report import GroupReport, Match, Report
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError, check_word
from merge.families.reconcile import reconcile
from merge.families.ties import ties_of
from merge.ir.align import is_rebuilt
from merge.ir.checkpoint import Checkpoint, linear_combination
from merge.symmetry.axes import factors_of
from merge.symmetry.symmetry import Symmetry
from merge.transport.couple import Coupled, Manner, couple_weights
from merge.transport.coupling import Coupling
from merge.transport.depth import DEPTHS
from merge.transport.features import METRICS
from merge.transport.mapped import carried, roles_of
from merge.transport.plans import MARGINALS
from merge.transport.scales import rescaled

if TYPE_CHECKING:
    from merge.aligning import Found

__all__ = [
    "BY",
    "DEPTHS",
    "FEATURES",
    "RESIDUALS",
    "Transport",
    "couple_checkpoints",
    "fuse",
    "fusion_reports",
]

BY = ("weights", "activations")
"""What units are compared by."""

FEATURES = ("both", "incoming")
"""Which weights: those that come into a unit, or also those that take from it."""

RESIDUALS = ("mean", "no_resid", "only_resid", "weighted_scalar", "weighted_matrix")
"""Which places a residual stream is coupled by, where it is by activations."""

_reports: WeakKeyDictionary[Checkpoint, tuple[Report, ...]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Transport:
    """How one network is carried over into another: the options of `fuse`."""

    manner: Manner = field(default_factory=Manner)
    by: str = "weights"
    residual: str = "mean"
    depth: str | None = None
    symmetry: object = None
    data: object = None
    keep: tuple[str, ...] = ()

    @classmethod
    def options(cls) -> list[str]:
        """The words that `of` takes."""
        return list(inspect.signature(cls.of).parameters)

    @classmethod
    def of(
        cls,
        *,
        by: str = "weights",
        regularisation: float = 0.0,
        marginals: str = "uniform",
        metric: str = "squared",
        features: str = "both",
        sweeps: int = 4,
        residual: str = "mean",
        depth: str | None = None,
        symmetry: object = None,
        data: object = None,
        keep: Sequence[str] = (),
    ) -> Transport:
        """The options, checked; RecipeError for what is none."""
        for key, word, words in (
            ("by", by, BY),
            ("marginals", marginals, MARGINALS),
            ("metric", metric, METRICS),
            ("features", features, FEATURES),
            ("residual", residual, RESIDUALS),
            ("depth", depth or "count", DEPTHS),
        ):
            check_word(word, words, key, f"{word!r} is no way of transport")
        if not 0 <= regularisation < 10:
            raise RecipeError(
                "the regularisation is relative to the largest cost",
                key="regularisation",
                found=regularisation,
                expected="0 for exact plans, or a number up to 10 such as 0.05",
            )
        if sweeps < 1:
            raise RecipeError("there is at least one sweep", key="sweeps", found=sweeps)
        manner = Manner(float(regularisation), marginals, metric, features, sweeps)  # type: ignore[arg-type]
        return cls(manner, by, residual, depth, symmetry, data, tuple(keep))


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


def couple_checkpoints(
    target: Checkpoint,
    moving: Checkpoint,
    how: Transport,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """What carries the checkpoint ``moving`` over into the coordinates of ``target``."""
    from merge.aligning import Found, symmetry_of
    from merge.deepening import as_deep

    moving = reconcile([target, moving])[1]
    pair = None
    if how.data is not None or how.by == "activations":
        from merge.tasks import pair_of, traced_symmetry

        pair = pair_of(how.data, moving, target)
        if how.symmetry is None and not target.side.config:
            how = replace(how, symmetry=traced_symmetry(pair.tasks[1]))
    deep = as_deep(moving, target, how.symmetry, how.depth, pair)
    moving, own, other = deep.checkpoint, deep.symmetry, symmetry_of(target, how.symmetry)
    _check_alike(target, moving, own, other)
    for name in how.keep:
        check_word(name, own.groups, "keep", f"there is no group {name!r} that could be kept")
    roles = roles_of(own)
    if how.by == "activations" and pair is not None:
        from merge.tasks import couple_on_data

        coupled = couple_on_data(pair, own, other, how)
    else:
        coupled = couple_weights(
            own, other, _Counting(moving, progress), _Counting(target, progress), roles,
            how.manner, names=_comparable(own, other, moving, target), keep=how.keep,
        )  # fmt: skip
    configs = (moving.side.config, target.side.config)
    tied = bool(ties_of(moving)) and bool(ties_of(target))
    scales = rescaled(own, other, coupled.couplings, roles, configs, tied=tied)

    def move(checkpoint: Checkpoint) -> Checkpoint:
        found = deep.change(reconcile([target, checkpoint])[1])
        return replace(carried(found, own, other, coupled.couplings, scales), side=target.side)

    return Found(Match({}, _report(own, other, coupled, how, moving.notes)), move)


class _Counting:
    """A checkpoint's tensors, one at a time; the bytes are counted."""

    def __init__(self, checkpoint: Checkpoint, progress: Callable[[int], None] | None) -> None:
        from merge.aligning import TensorsOf

        self._tensors = TensorsOf(checkpoint)
        self._progress = progress
        self._seen: set[str] = set()

    def read(self, name: str, first: int = 0, last: int | None = None) -> Any:
        """The tensor ``name``, or some of its rows."""
        found = self._tensors.read(name, first, last)
        if self._progress is not None and name not in self._seen:
            self._seen.add(name)
            self._progress(found.numel() * found.element_size())
        return found


def _comparable(
    own: Symmetry, other: Symmetry, moving: Checkpoint, target: Checkpoint
) -> list[str]:
    """Tensors of floats, each once, that differ in the sizes of groups only."""

    def fixed(symmetry: Symmetry, name: str) -> list[int]:
        axes = symmetry.tensors[name].axes
        return [f.size for axis in axes for f in factors_of(axis) if f.group is None]

    return [
        n
        for n in own.tensors
        if n in target.tensors
        and n in moving.tensors
        and n not in target.tied
        and n not in moving.tied
        and moving.tensors[n].dtype.kind == "float"
        and fixed(own, n) == fixed(other, n)
    ]


def _check_alike(first: Checkpoint, second: Checkpoint, own: Symmetry, other: Symmetry) -> None:
    """Both networks have the same groups on the same axes, of whatever size."""
    groups = [
        g
        for g in {**own.groups, **other.groups}
        if g not in own.groups
        or g not in other.groups
        or own.groups[g].per != other.groups[g].per
        or own.groups[g].flags != other.groups[g].flags
    ]
    if groups:
        name = groups[0]
        raise PlanError(
            "the two models differ in what may be exchanged in them, and cannot be fused",
            model=second.label,
            against=first.label,
            group=name,
            found=own.groups.get(name, "no such group"),
            expected=other.groups.get(name, "no such group"),
            do="fuse models of one architecture",
        )
    names = {**own.tensors, **other.tensors}
    odd = [n for n in names if _texts(own, n) != _texts(other, n) and not is_rebuilt(n)]
    if odd:
        raise PlanError(
            "the two models differ in a tensor, and cannot be fused",
            model=second.label,
            against=first.label,
            tensor=odd[0],
            found=_texts(own, odd[0]) or "no such tensor",
            expected=_texts(other, odd[0]) or "no such tensor",
            do="fuse models of one architecture",
        )


def _texts(symmetry: Symmetry, name: str) -> str:
    """The axes of a tensor without sizes."""
    layout = symmetry.tensors.get(name)
    if layout is None:
        return ""
    return ", ".join(str(a.map(lambda f: replace(f, size=0))) for a in layout.axes)


def _report(
    own: Symmetry, other: Symmetry, coupled: Coupled, how: Transport, notes: tuple[str, ...]
) -> Report:
    groups = tuple(
        GroupReport(
            name, other.groups[name].size, 1, _away(coupling, own, other, name),
            coupled.scores.get(name),
        )
        for name, coupling in coupled.couplings.items()
    )  # fmt: skip
    sizes = [g.size for g in groups]
    moved = sum(g.moved * n for g, n in zip(groups, sizes, strict=True)) / max(1, sum(sizes))
    kind = "entropic" if how.manner.regularisation else "exact"
    changed = [
        f"{g}: {own.groups[g].size} units become {other.groups[g].size}"
        for g in own.groups
        if own.groups[g].size != other.groups[g].size
    ]
    return Report(
        method=f"{kind} transport by {how.by}",
        objective=coupled.objective,
        converged=coupled.converged,
        before=None,
        after=None,
        moved=moved,
        groups=groups,
        notes=(*(n for n in notes if n.startswith("layers of")), *coupled.notes, *changed),
    )


def _away(coupling: Coupling, own: Symmetry, other: Symmetry, name: str) -> float:
    """The share of a plan's mass that goes to a unit of another number."""
    if own.groups[name].size != other.groups[name].size:
        return 1.0
    return max(0.0, 1.0 - float(coupling.plan.mass.trace()))
