"""Align one checkpoint with another: symmetry, tensors, data and matching joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from merge import symmetries
from merge.alignment.moved import moved
from merge.alignment.report import Match, Report
from merge.alignment.weight import match_weights
from merge.checkpoint import open_checkpoint
from merge.engine.heap import give_back_freed_memory
from merge.errors import PlanError, RecipeError, check_word
from merge.families.reconcile import reconcile
from merge.ir.align import is_rebuilt
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import reads
from merge.stream import TensorsOf
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from merge.analysis.task import Task

__all__ = [
    "METHODS",
    "ROTATIONS",
    "Found",
    "How",
    "align",
    "alignment_report",
    "check_method",
    "match_checkpoints",
    "symmetry_of",
]

METHODS = ("weight", "activation", "ste", "transport")
"""Ways to find which units are alike; by transport networks of other widths too."""

ROTATIONS = ("values", "phases", "stream")
"""What may be rotated as well, where the symmetry allows it."""

_reports: WeakKeyDictionary[Checkpoint, Report] = WeakKeyDictionary()


def align(
    b: object,
    to: object,
    method: str = "weight",
    *,
    symmetry: object = None,
    data: str | Task | None = None,
    keep: Sequence[str] = (),
    signed: bool = False,
    rotate: Sequence[str] = (),
    transport: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Checkpoint:
    """``b`` in the coordinates of ``to``: the same function, its units moved to their likes.

    The result is lazy: its tensors are those of ``b`` in another order, to the bit. The search for
    that order reads both networks now; `merge.alignment_report` tells what it found.

    b, to: anything `merge.open` takes, of one architecture. method: ``weight`` (nearest weights, no
    data needed), ``activation`` (units that answer alike to the data), ``ste`` (the least loss of
    the mid-point) or ``transport`` (plans of optimal transport: ``b`` may be wider or narrower; it
    is computed in the widths of ``to`` unless all plans are permutations). symmetry: a symmetry
    spec, as a file, parsed JSON or `Symmetry`; by default that of the model's type. data: a
    `merge.Task`, or text as for ``merge barrier --data``; a list of two where modules differ. keep:
    groups that stay where they are. signed: change signs too, where the symmetry allows it.
    rotate: of ``values`` (dimensions of values in each head, and others that may be mixed),
    ``phases`` (the planes of rotary positions) and ``stream`` (the residual stream, with the gains
    of ``to``): these are computed in float32 and rounded. transport: options of `merge.fuse` for
    that method, such as ``{"regularisation": 0.05}``. progress: called with bytes read since the
    last call.

    Example::

        aligned = merge.align("run-b", to="run-a")
        merge.average(["run-a", aligned]).save("both")
    """
    first, second = (open_checkpoint(x) for x in (to, b))
    options = tuple(sorted((transport or {}).items()))
    how = How(method, symmetry, data, tuple(keep), signed, tuple(rotate), options)
    found = match_checkpoints(first, second, how, progress)
    result = found.move(second)
    _reports[result] = found.match.report
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


@dataclass(frozen=True, slots=True)
class How:
    """How checkpoints are aligned: the options of `align`."""

    method: str = "weight"
    symmetry: object = None
    data: str | Task | None = None
    keep: tuple[str, ...] = ()
    signed: bool = False
    rotate: tuple[str, ...] = ()
    transport: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What brings one checkpoint, and whatever has its tensors, to another."""

    match: Match
    move: Callable[[Checkpoint], Checkpoint]


def match_checkpoints(
    first: Checkpoint,
    second: Checkpoint,
    how: How,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """What brings the second checkpoint into the coordinates of the first."""
    check_method(how.method)
    give_back_freed_memory()
    if how.method == "transport":
        return _carried(first, second, how, progress)
    if how.transport:
        raise RecipeError(
            "options of transport are given, and the method is another",
            key=how.transport[0][0],
            found=f"method: {how.method}",
            expected="method: transport",
        )
    for kind in how.rotate:
        check_word(kind, ROTATIONS, "rotate", f"there is nothing called {kind!r} to be rotated")
    first = reconcile([second, first])[1]
    own, other = (symmetry_of(c, how.symmetry) for c in (second, first))
    _check_alike(first, second, own, other)
    for name in how.keep:
        check_word(name, own.groups, "keep", f"there is no group {name!r} that could be kept")
    a, b = TensorsOf(first), TensorsOf(second)
    names = _comparable(first, second)
    if how.method == "weight":
        match = match_weights(
            own, a, b, names=names, keep=how.keep, signed=how.signed, progress=progress
        )
    else:
        from merge.tasks import match_on_data

        match = match_on_data(first, second, own, how)
    if how.rotate:
        return _rotated(first, second, own, match, how, names)
    return Found(match, lambda checkpoint: moved(checkpoint, own, match.element))


def _carried(
    first: Checkpoint,
    second: Checkpoint,
    how: How,
    progress: Callable[[int], None] | None,
) -> Found:
    """The second checkpoint carried over into the coordinates, and widths, of the first."""
    from merge.carrying import Transport, couple_checkpoints

    for key, given in (("signed", how.signed), ("rotate", how.rotate)):
        if given:
            raise RecipeError(
                "transport moves units by plans, and changes no signs and turns nothing",
                key=key,
                do=f"leave out {key}, or align by weight",
            )
    try:
        wanted = Transport.of(**dict(how.transport), symmetry=how.symmetry, keep=how.keep)
    except TypeError:
        known = [k for k in Transport.options() if k not in ("symmetry", "keep", "data")]
        odd = next(k for k, _ in how.transport if k not in known)
        check_word(odd, known, "transport", f"transport has no option {odd!r}")
        raise
    return couple_checkpoints(first, second, replace(wanted, data=how.data), progress)


def _rotated(
    first: Checkpoint,
    second: Checkpoint,
    own: Symmetry,
    match: Match,
    how: How,
    names: Sequence[str],
) -> Found:
    """A match carried on to rotations."""
    from merge.alignment.continuous import rotate
    from merge.alignment.stream import folded, gains_of, match_stream, unfolded

    a, b = TensorsOf(first), TensorsOf(second)
    gains: Mapping[str, str] = {}
    kinds = [k for k in how.rotate if k != "stream"]
    if "stream" in how.rotate:
        gains = gains_of(own, second.tied)
        symmetry, match = match_stream(own, a, b, match, kinds, names=names, keep=how.keep)
    else:
        symmetry, match = rotate(own, a, b, match, kinds)

    def move(checkpoint: Checkpoint) -> Checkpoint:
        if not gains:
            return moved(checkpoint, symmetry, match.element)
        inside = moved(folded(checkpoint, gains), symmetry, match.element)
        return unfolded(inside, first, gains, checkpoint.tensors)

    return Found(match, move)


def check_method(method: str) -> None:
    """RecipeError unless there is such a method."""
    check_word(method, METHODS, "method", f"there is no alignment method {method!r}")


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
    every = {**own.tensors, **other.tensors}
    odd += [n for n in every if (n in own.tensors) != (n in other.tensors) and not is_rebuilt(n)]
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
