"""Checkpoints in other sizes: fewer blocks, narrower layers, or more layers of what there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from merge import symmetries
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError, hint
from merge.families.config import relayer
from merge.families.layers import Layers, of_stack, place_of
from merge.ir.align import short
from merge.ir.checkpoint import Checkpoint
from merge.resize.importance import weight_importance
from merge.resize.selection import most, selected
from merge.stream import TensorsOf
from merge.symmetry.patterns import Finder, Pattern
from merge.symmetry.roles import resized
from merge.symmetry.sizes import assigned, key_of, look_up
from merge.symmetry.spec import Spec
from merge.symmetry.symmetry import Symmetry
from merge.transport.coupling import Coupling
from merge.transport.mapped import carried, roles_of

if TYPE_CHECKING:
    from merge.analysis.task import Task

__all__ = ["IMPORTANCE", "Blocks", "is_gain", "keys_of", "shrink", "sizes_of"]

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
@dataclass(frozen=True, slots=True)
class Blocks:
    """A checkpoint's stack of layers: its name, how many there are."""

    stack: str
    count: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Blocks:
        """The only stack, or the only one that the config counts; PlanError for several."""
        stacks = Layers.of(checkpoint.tensors).stacks
        config = checkpoint.side.config
        counted = [s for s, n in stacks.items() if relayer(config, s, n, [(config, 0)]).counted]
        found = list(stacks) if len(stacks) == 1 else counted
        if len(found) != 1:
            raise PlanError(
                "it is not clear which layers are meant",
                model=checkpoint.label,
                found=", ".join(f"{s} ({n} layers)" for s, n in stacks.items()) or "no layers",
                expected="one stack of layers that config.json counts",
            )
        return cls(found[0], stacks[found[0]])

    def name(self, number: int) -> str:
        """What a layer's tensors begin with, without the dot."""
        return f"{self.stack}.{number}" if self.stack else str(number)


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
    return _with_layers(checkpoint, blocks, keep, notes)


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


def _with_layers(
    checkpoint: Checkpoint, blocks: Blocks, keep: Sequence[int], notes: list[str]
) -> Checkpoint:
    """The checkpoint with the layers ``keep``, numbered anew; config.json counts them."""
    shared = of_stack(checkpoint.tensors, blocks.stack)
    new: dict[str, str] = {}
    for name in checkpoint.tensors:
        place = place_of(name)
        if place is None or place[0] != blocks.stack:
            new[name] = name
        elif name in shared:
            new[name] = f"{blocks.name(0)}{place[2]}"
        elif place[1] in keep:
            new[name] = f"{blocks.name(list(keep).index(place[1]))}{place[2]}"
    config = checkpoint.side.config
    changed = relayer(config, blocks.stack, blocks.count, [(config, n) for n in keep])
    if config and not changed.counted:
        notes.append(f"config.json counts no layers of {blocks.stack}: it stays as it is")
    notes += [f"config.json: look at {key!r}, which speaks of layers" for key in changed.unsure]
    tied = {new[a]: new[b] for a, b in checkpoint.tied.items() if a in new and b in new}
    return replace(
        checkpoint,
        tensors={new[n]: e for n, e in checkpoint.tensors.items() if n in new},
        folders={new[n]: f for n, f in checkpoint.folders.items() if n in new},
        tied=tied,
        side=checkpoint.side.with_config(changed.config) if config else checkpoint.side,
        stored=None,
    )


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


def _is_key(word: str) -> bool:
    return all(part.isidentifier() for part in word.split("."))


def is_gain(symmetry: Symmetry, name: str, group: str) -> bool:
    """Whether a tensor is the gain of a norm over the group."""
    layout = symmetry.tensors[name]
    return len(layout.axes) == 1 and layout.groups() == [group] and name.endswith("weight")


def sizes_of(
    checkpoint: Checkpoint, own: Symmetry, widths: Mapping[str, int]
) -> tuple[dict[str, object], dict[str, int]]:
    """config.json with new widths, and the new sizes of groups.

    widths: by keys of config.json or groups. RecipeError for a name of neither, PlanError where
    groups of one key would come to differ.
    """
    spec, _ = symmetries.spec_of(checkpoint)
    stated = _stated(spec, own)
    keys = {g: key_of(spec.groups[p].size or "") for g, p in stated.items()}
    config: dict[str, object] = dict(checkpoint.side.config)
    sizes: dict[str, int] = {}
    for word, size in widths.items():
        groups = [g for g in own.groups if word in (g, stated.get(g), keys.get(g))]
        value = look_up(word, config) if _is_key(word) else None
        if not groups and (value is not None or word in config):
            silent = {p: own.groups[g].size for g, p in stated.items() if not spec.groups[p].size}
            silent = {p: n for p, n in silent.items() if value in (None, n)}
            groups = [g for g in own.groups if stated.get(g) in silent] if len(silent) == 1 else []
            config = assigned(word, config, size)
            if not groups and isinstance(value, int):
                continue  # of no group by itself, such as query heads
        if not groups:
            every = dict.fromkeys([*(k for k in keys.values() if k), *own.groups])
            raise RecipeError(
                "no part of this model has a width of that name",
                key=word,
                model=checkpoint.label,
                expected=f"one of {', '.join(list(every)[:12])}",
                do=hint(word, every),
            )
        sizes.update(dict.fromkeys(groups, size))
        key = word if word in keys.values() else keys.get(groups[0])
        alike = [g for g in own.groups if key is not None and keys.get(g) == key]
        if key is not None and config:
            if set(alike) - set(groups):
                raise PlanError(
                    "config.json has one size for all of these groups",
                    model=checkpoint.label,
                    key=key,
                    found=f"a new size for {', '.join(groups[:4])} alone",
                    expected=f"{key}={size}",
                )
            config = assigned(key, config, size)
    return config, sizes


def keys_of(checkpoint: Checkpoint, own: Symmetry) -> dict[str, str | None]:
    """Of each group the key of config.json that states its size, or None where none does."""
    spec, _ = symmetries.spec_of(checkpoint)
    return {g: key_of(spec.groups[p].size or "") for g, p in _stated(spec, own).items()}


def _stated(spec: Spec, own: Symmetry) -> dict[str, str]:
    """Of each group what the spec calls it, such as ``f{i}``."""
    find = Finder(Pattern.of(name) for name in spec.groups)
    return {g: find(g)[0][0].text for g in own.groups if find(g)}


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
