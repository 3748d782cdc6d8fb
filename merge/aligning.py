"""Align one checkpoint with another: symmetry, tensors, data and matching joined."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from merge import run, symmetries
from merge.alignment.moved import moved
from merge.alignment.report import Match, Report
from merge.alignment.weight import match_weights
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError, nearest
from merge.families.reconcile import reconcile
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import window
from merge.ir.expr import Read, reads
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    import torch

    from merge.analysis.task import Task
    from merge.recipe.schema import AlignEntry, RepairEntry

__all__ = [
    "METHODS",
    "RecipeSteps",
    "align",
    "alignment_report",
    "check_method",
    "match_checkpoints",
    "symmetry_of",
]

METHODS = ("weight", "activation", "ste")
"""Ways to find which units are alike."""

_reports: WeakKeyDictionary[Checkpoint, Report] = WeakKeyDictionary()


def align(
    b: object,
    to: object,
    method: str = "weight",
    *,
    symmetry: object = None,
    data: str | Task | None = None,
    keep: Collection[str] = (),
    signed: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Checkpoint:
    """``b`` in the coordinates of ``to``: the same function, its units moved to their likes.

    The result is lazy: its tensors are those of ``b`` in another order, to the bit. The search for
    that order reads both networks now; `merge.alignment_report` tells what it found.

    b, to: anything `merge.open` takes, of one architecture. method: ``weight`` (nearest weights, no
    data needed), ``activation`` (units that answer alike to the data) or ``ste`` (the least loss of
    the mid-point). symmetry: a symmetry spec, as a file, parsed JSON or `Symmetry`; by default
    that of the model's type. data: a `merge.Task`, or text as for ``merge barrier --data``. keep:
    groups that stay where they are. signed: change signs too, where the symmetry allows it.
    progress: called with bytes read since the last call.

    Example::

        aligned = merge.align("run-b", to="run-a")
        merge.average(["run-a", aligned]).save("both")
    """
    first, second = (open_checkpoint(x) for x in (to, b))
    own, match = match_checkpoints(
        first, second, method, symmetry, data, keep, signed=signed, progress=progress
    )
    result = moved(second, own, match.element)
    _reports[result] = match.report
    return result


def alignment_report(checkpoint: Checkpoint) -> Report:
    """What `merge.align` found when it made ``checkpoint``; PlanError for one of other origin."""
    found = _reports.get(checkpoint)
    if found is None:
        raise PlanError(
            "there is no alignment report for this checkpoint",
            model=checkpoint.label,
            do="give the checkpoint that merge.align returned, before anything was made of it",
        )
    return found


def match_checkpoints(
    first: Checkpoint,
    second: Checkpoint,
    method: str,
    symmetry: object = None,
    data: str | Task | None = None,
    keep: Collection[str] = (),
    *,
    signed: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Symmetry, Match]:
    """The second checkpoint's symmetry, and the element of it that brings it to the first."""
    check_method(method)
    first = reconcile([second, first])[1]
    own, other = (symmetry_of(c, symmetry) for c in (second, first))
    _check_alike(first, second, own, other)
    for name in keep:
        if name not in own.groups:
            near = nearest(name, own.groups)
            raise RecipeError(
                f"there is no group {name!r} that could be kept",
                key="keep",
                found=name,
                expected=f"groups of the symmetry: {', '.join(list(own.groups)[:8])}, ...",
                do=f"did you mean {near!r}?" if near else None,
            )
    if method == "weight":
        names = _comparable(first, second)
        match = match_weights(
            own,
            _Tensors(first),
            _Tensors(second),
            names=names,
            keep=keep,
            signed=signed,
            progress=progress,
        )
        return own, match
    from merge.tasks import match_on_data

    return own, match_on_data(first, second, method, own, symmetry, data, keep, signed=signed)


def check_method(method: str) -> None:
    """RecipeError unless there is such a method."""
    if method not in METHODS:
        near = nearest(method, METHODS)
        raise RecipeError(
            f"there is no alignment method {method!r}",
            key="method",
            found=method,
            expected=f"one of {', '.join(METHODS)}",
            do=f"did you mean {near!r}?" if near else None,
        )


_found: deque[tuple[Checkpoint, Checkpoint, AlignEntry, Symmetry, Match]] = deque(maxlen=8)
"""The last matches of recipes: a sweep compiles its recipe anew for every value."""


class RecipeSteps:
    """Computes the alignments and repairs of recipes."""

    def align(
        self, model: Checkpoint, to: Checkpoint, how: AlignEntry
    ) -> tuple[Callable[[Checkpoint], Checkpoint], str]:
        """What brings ``model`` into the coordinates of ``to``, and what was found."""
        known = (f for f in _found if f[2] == how and f[0].same_as(model) and f[1].same_as(to))
        own, match = next((f[3:] for f in known), None) or match_checkpoints(
            to, model, how.method, how.symmetry, how.data, how.keep, signed=how.signed
        )
        if all(r.source.files for c in (model, to) for e in c.tensors.values() for r in reads(e)):
            _found.append((model, to, how, own, match))  # weights in memory may change unseen
        report = match.report
        told = f"{report.method}, {report.moved:.1%} of the coordinates moved"
        if report.before is not None and report.after is not None:
            told += f", cosine of the weights {report.before:.4f} -> {report.after:.4f}"

        def move(checkpoint: Checkpoint) -> Checkpoint:
            return replace(moved(checkpoint, own, match.element), label=checkpoint.label)

        return move, told

    def repair(
        self, merged: Checkpoint, parents: Sequence[Checkpoint], how: RepairEntry
    ) -> tuple[Checkpoint, str]:
        """The merged checkpoint with its parents' statistics, and what was done."""
        from merge.tasks import repaired

        return repaired(merged, parents, how.data, how.weights)


# -- symmetries ------------------------------------------------------------------------------------
def symmetry_of(checkpoint: Checkpoint, given: object = None) -> Symmetry:
    """The symmetry of a checkpoint: ``given``, fitted to it, or that of its model type.

    What a model without a head returns may come out in another order: in that of the other model.
    """
    if isinstance(given, Symmetry):
        return given
    return symmetries.symmetry_of(checkpoint, spec=given, outputs="free")


def _check_alike(first: Checkpoint, second: Checkpoint, own: Symmetry, other: Symmetry) -> None:
    """Both networks have the same groups on the same axes."""
    for name, group in own.groups.items():
        found = other.groups.get(name)
        if found is None or found != group:
            raise PlanError(
                "the two models differ in what may be exchanged in them, and cannot be aligned",
                model=second.label,
                against=first.label,
                group=name,
                found=f"{group.size} coordinates"
                + (f" for each of {', '.join(group.per)}" if group.per else ""),
                expected="no such group"
                if found is None
                else f"{found.size} coordinates"
                + (f" for each of {', '.join(found.per)}" if found.per else ""),
                do="align models of one architecture and size",
            )
    odd = [n for n in own.tensors if n in other.tensors and _groups(own, n) != _groups(other, n)]
    odd += [
        n for n in {**own.tensors, **other.tensors} if (n in own.tensors) != (n in other.tensors)
    ]
    if odd:
        name = odd[0]
        raise PlanError(
            "the two models differ in a tensor, and cannot be aligned",
            model=second.label,
            against=first.label,
            tensor=name,
            found=_axes(own, name),
            expected=_axes(other, name),
            do="align models of one architecture",
        )


def _groups(symmetry: Symmetry, name: str) -> list[str]:
    return symmetry.tensors[name].groups()


def _axes(symmetry: Symmetry, name: str) -> str:
    layout = symmetry.tensors.get(name)
    return "no such tensor" if layout is None else ", ".join(map(str, layout.axes))


# -- tensors ---------------------------------------------------------------------------------------
def _comparable(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Tensors of floats of one shape in both, each once, in the order in which they lie on disk.

    Embeddings of different vocabularies have no rows in common to go by.
    """
    names = [
        n
        for n, e in second.tensors.items()
        if n not in second.tied
        and e.dtype.kind == "float"
        and n in first.tensors
        and first.tensors[n].shape == e.shape
    ]

    def place(name: str) -> tuple[str, int]:
        found = reads(second.tensors[name])
        where = found[0].source.location(found[0].spec.name) if found else None
        return ("", 0) if where is None else (where.file, where.offset)

    return sorted(names, key=place)


class _Tensors:
    """A checkpoint's tensors, one at a time: read as stored, or computed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The tensor ``name``, or its rows from ``first`` on and before ``last``."""
        import math

        import torch

        from merge.engine.stage import bytes_of, torch_dtype

        expr = self._checkpoint.tensors[name]
        shape = expr.shape if last is None else (last - first, *expr.shape[1:])
        start = first * math.prod(expr.shape[1:])
        if isinstance(expr, Read):
            found = torch.empty(shape, dtype=torch_dtype(expr.dtype))
            with expr.source.open(expr.spec.name) as reader:
                reader.read_into(start * expr.dtype.itemsize, bytes_of(found))
            return found
        part = Checkpoint({name: window(expr, start, shape)}, self._checkpoint.label)
        return run.state_dict(part)[name]
