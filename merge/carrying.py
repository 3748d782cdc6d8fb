"""What carries one checkpoint over into the widths and coordinates of another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from merge.alignment.report import GroupReport, Match, Report
from merge.errors import PlanError, RecipeError, check_word
from merge.families.reconcile import reconcile
from merge.families.ties import ties_of
from merge.ir.align import is_rebuilt
from merge.ir.checkpoint import Checkpoint
from merge.stream import TensorsOf
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

__all__ = ["BY", "FEATURES", "RESIDUALS", "Transport", "couple_checkpoints"]

BY = ("weights", "activations")
"""What units are compared by."""

FEATURES = ("both", "incoming")
"""Which weights: those that come into a unit, or also those that take from it."""

RESIDUALS = ("mean", "no_resid", "only_resid", "weighted_scalar", "weighted_matrix")
"""Which places a residual stream is coupled by, where it is by activations."""


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
