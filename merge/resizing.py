"""Checkpoints in other sizes: fewer blocks, narrower layers, or more layers of what there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge import symmetries
from merge.blocks import Blocks, with_layers
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError, hint
from merge.ir.align import short
from merge.ir.checkpoint import Checkpoint
from merge.resize.importance import weight_importance
from merge.resize.selection import most, selected
from merge.stream import TensorsOf
from merge.symmetry.roles import resized
from merge.symmetry.symmetry import Symmetry
from merge.transport.coupling import Coupling
from merge.transport.mapped import carried, roles_of
from merge.widths import sizes_of

if TYPE_CHECKING:
    from merge.analysis.task import Task

__all__ = ["IMPORTANCE", "is_gain", "shrink"]

IMPORTANCE = ("weights", "activations")
"""What units are judged by."""


def shrink(
    model: object,
    *,
    widths: Mapping[str, int] | None = None,
    layers: int | Sequence[int] | None = None,
    data: str | Task | None = None,
    importance: str | None = None,
    least_squares: bool | None = None,
    rescale: bool | None = None,
    ridge: float = 1e-4,
    samples: int = 256,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """``model`` with fewer blocks and narrower layers, not yet computed; its config follows.

    widths: new sizes by the keys of config.json, such as ``{"intermediate_size": 1024}``, or by the
    groups of the model's symmetry (``f3``, or ``f{i}`` for every layer). Units are cut by their
    importance: of ``weights`` (what writes a unit times what reads it), or, with data, mean
    ``activations``. layers: how many to keep, or which, counted from 0. Without data they go from
    the middle; with data the least influential goes first, measured anew after each.

    data: a `Task`, or what names one; its training inputs are run. least_squares: what reads the
    units that are left is fitted to what it gave with all of them, and the last map before a block
    that goes to what the stream was after it; by default where there is data. rescale: what reads
    fewer units is multiplied by the root of old over new, where it is not fitted; by default only
    behind norms, whose outputs keep their variance (weight subcloning, arXiv:2312.09299, does so
    everywhere). ridge: relative, towards the plain cut. samples: examples of the data at most. With
    data the model is in memory, once. PlanError where sizes do not fit together.

    Example::

        merge.shrink("org/model", layers=20, widths={"intermediate_size": 4096}).save("smaller")
    """
    if importance is None:
        importance = "weights" if data is None else "activations"
    if importance not in IMPORTANCE:
        raise RecipeError(
            "units cannot be judged by that",
            key="importance",
            found=repr(importance),
            expected=f"one of {', '.join(IMPORTANCE)}",
            do=hint(importance, IMPORTANCE),
        )
    if data is None and (importance == "activations" or least_squares):
        raise RecipeError(
            "this needs data, and none was given",
            key="importance" if importance == "activations" else "least_squares",
            do="give data, or leave it out",
        )
    checkpoint = open_checkpoint(model)
    known = None
    if data is not None:
        from merge.resizing_data import Known

        known = Known.of(checkpoint, data, samples, ridge)
    fit = data is not None if least_squares is None else least_squares
    notes: list[str] = []
    found = checkpoint
    if layers is not None:
        found = _fewer_layers(found, layers, known, fit, notes, progress)
    if widths:
        found = _narrower(found, widths, importance, known, fit, rescale, notes, progress)
    if not widths and layers is None:
        raise RecipeError("nothing is to be shrunk", expected="layers, widths, or both")
    return replace(
        found, label=f"shrunk({short(checkpoint.label)})", notes=(*checkpoint.notes, *notes)
    )


# -- blocks ----------------------------------------------------------------------------------------


def _fewer_layers(
    checkpoint: Checkpoint,
    layers: int | Sequence[int],
    known: Any,
    fit: bool,
    notes: list[str],
    progress: Callable[[str], None] | None,
) -> Checkpoint:
    blocks = Blocks.of(checkpoint)
    if isinstance(layers, int):
        if not 1 <= layers <= blocks.count:
            raise PlanError(
                "not that many layers can be kept",
                model=checkpoint.label,
                found=layers,
                expected=f"1 to {blocks.count}",
            )
        gone = _gone(blocks, blocks.count - layers, known, notes, progress)
        keep = [n for n in range(blocks.count) if n not in gone]
    else:
        keep = list(layers)
        if keep != sorted(set(keep)) or not keep or not 0 <= keep[0] <= keep[-1] < blocks.count:
            raise PlanError(
                "the layers to keep are not some of the model's, in order",
                model=checkpoint.label,
                found=keep,
                expected=f"rising numbers from 0 to {blocks.count - 1}",
            )
        gone = [n for n in range(blocks.count) if n not in keep]
    if known is not None:
        checkpoint = known.without(checkpoint, blocks, gone, fit, notes)
    if gone:
        notes.append(f"layers left out: {', '.join(map(str, sorted(gone)))}")
    return with_layers(checkpoint, blocks, keep, notes)


def _gone(
    blocks: Blocks,
    count: int,
    known: Any,
    notes: list[str],
    progress: Callable[[str], None] | None,
) -> list[int]:
    """The numbers of layers to leave out, in the order in which they go."""
    if known is None:
        first = (blocks.count - count + 1) // 2
        return list(range(first, first + count))
    names = {blocks.name(n): n for n in range(blocks.count)}
    found = known.least_influential(list(names), count, progress)
    notes += [f"layer {names[b]} goes: its influence is {score:.4f}" for b, score in found]
    return [names[b] for b, _ in found]


# -- widths ----------------------------------------------------------------------------------------
def _narrower(
    checkpoint: Checkpoint,
    widths: Mapping[str, int],
    importance: str,
    known: Any,
    fit: bool,
    rescale: bool | None,
    notes: list[str],
    progress: Callable[[str], None] | None,
) -> Checkpoint:
    own = symmetries.symmetry_of(checkpoint)
    config, sizes = sizes_of(checkpoint, own, widths)
    for group, size in sizes.items():
        _check(own, group, size, checkpoint.label)
    roles = roles_of(own)
    if importance == "weights":
        scores = weight_importance(own, roles, TensorsOf(checkpoint), list(sizes))
    else:
        scores = known.importance(own, list(sizes))
    couplings: dict[str, Coupling] = {}
    for group, size in sizes.items():
        old = own.groups[group].size
        behind_norm = any(is_gain(own, n, group) for n in own.places(group))
        scaled = rescale if rescale is not None else behind_norm
        index = most(scores[group], size, group)
        couplings[group] = selected(index, old, (old / size) ** 0.5 if scaled else 1.0)
    target = resized(own, sizes)
    narrow = carried(checkpoint, own, target, couplings)
    if fit and known is not None:
        narrow = known.refitted(checkpoint, narrow, own, roles, couplings, progress)
    notes.append(f"cut by {importance}: {', '.join(f'{k} to {v}' for k, v in widths.items())}")
    found = replace(narrow, side=narrow.side.with_config(config) if config else narrow.side)
    symmetries.symmetry_of(found)  # sizes that do not fit together show here
    return found


def is_gain(symmetry: Symmetry, name: str, group: str) -> bool:
    """Whether a tensor is the gain of a norm over the group."""
    layout = symmetry.tensors[name]
    return len(layout.axes) == 1 and layout.groups() == [group] and name.endswith("weight")


def _check(own: Symmetry, group: str, size: int, label: str) -> None:
    found = own.groups[group]
    if not found.flags:
        raise PlanError(
            "the units of a group cannot be cut",
            model=label,
            group=group,
            found=found.reason or "a group that stays as it is",
        )
    if found.per or not 1 <= size <= found.size:
        raise PlanError(
            "a group cannot be cut to that size",
            model=label,
            group=group,
            found=size,
            expected=f"1 to {found.size}" if not found.per else "a group that depends on no other",
        )
