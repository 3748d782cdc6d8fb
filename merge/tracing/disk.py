"""The names that a model's tensors have on disk, where these are not the module's own.

transformers writes one tensor for each expert where the module has them stacked, and old names
where it renamed modules. What was written is found by numbers: the twin is saved with a number of
its own in each element, and the numbers in the files say what a tensor on disk is made of.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge.symmetry.axes import Axis, Factor
from merge.symmetry.symmetry import Layout, Symmetry
from merge.tracing.mode import plain_operators
from merge.tracing.trace import state_of
from merge.tracing.twins import quiet

__all__ = ["on_disk", "saved_tensors"]


@dataclass(frozen=True, slots=True)
class _Source:
    """Which part of a module's tensor one on disk is: an axis or a number for each axis of its own.

    ``places[k]`` is (axis on disk, first, last) where axis k of the module's tensor runs along an
    axis on disk, and (None, number, number) where it stands still.
    """

    name: str
    places: tuple[tuple[int | None, int, int], ...]


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes, by the names in the files."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder, quiet():
        module.save_pretrained(folder)  # type: ignore[operator]
        files = sorted(Path(folder).glob("*.safetensors"))
        return dict(itertools.chain.from_iterable(load_file(f).items() for f in files))


def on_disk(symmetry: Symmetry, module: nn.Module) -> Symmetry:
    """The symmetry of the files that ``module`` is saved to.

    Tensors on disk that are made of the module's in a way that axes cannot express are fixed, with
    a note.
    """
    with plain_operators():
        return _on_disk(symmetry, module)


def _on_disk(symmetry: Symmetry, module: nn.Module) -> Symmetry:
    codes, owners = _coded(module)
    tensors: dict[str, Layout] = {}
    notes = list(symmetry.notes)
    for name, tensor in saved_tensors(codes).items():
        layout = _layout(symmetry, tensor, owners)
        if layout is None:
            notes.append(f"{name} on disk is made of the module's tensors in an unknown way")
            axes = tuple(Axis(((Factor(None, n, reason="disk"),),)) for n in tensor.shape)
            layout = Layout(tuple(tensor.shape), axes)
        tensors[name] = layout
    reasons = {**symmetry.reasons, "disk": "written to disk in an unknown way"}
    return replace(
        symmetry, tensors=_with_siblings(tensors, symmetry), reasons=reasons, notes=tuple(notes)
    )


def _coded(module: nn.Module) -> tuple[nn.Module, list[tuple[str, int, tuple[int, ...]]]]:
    """A copy with a number of its own in each element; where each tensor's numbers begin."""
    import copy

    coded = copy.deepcopy(module).double()
    owners: list[tuple[str, int, tuple[int, ...]]] = []
    seen: set[int] = set()
    at = 1
    with torch.no_grad():
        for name, tensor in state_of(coded).items():
            if id(tensor) in seen or not tensor.is_floating_point():
                continue
            seen.add(id(tensor))
            numbers = torch.arange(at, at + tensor.numel(), dtype=torch.float64)
            tensor.copy_(numbers.reshape(tensor.shape))
            owners.append((name, at, tuple(tensor.shape)))
            at += tensor.numel()
    return coded, owners


def _layout(
    symmetry: Symmetry, tensor: Tensor, owners: Sequence[tuple[str, int, tuple[int, ...]]]
) -> Layout | None:
    """The layout of a tensor of numbers; None where it cannot be told."""
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return Layout(shape, tuple(Axis(((Factor(None, n),),)) for n in shape))
    pieces = _pieces(tensor, owners)
    if pieces is None:
        return None
    along, sources = pieces
    layouts = [_of_source(symmetry, source, shape) for source in sources]
    if any(layout is None for layout in layouts):
        return None
    found = [layout for layout in layouts if layout is not None]
    if len(found) == 1:
        return found[0]
    axes = list(found[0].axes)
    if any(other.axes[k] != axes[k] for other in found for k in range(len(axes)) if k != along):
        return None
    axes[along] = Axis(tuple(p for layout in found for p in layout.axes[along].parts))
    return Layout(shape, tuple(axes))


def _pieces(
    tensor: Tensor, owners: Sequence[tuple[str, int, tuple[int, ...]]]
) -> tuple[int, list[_Source]] | None:
    """The tensors that one on disk is put together of, along one axis."""
    starts = torch.tensor([start for _, start, _ in owners], dtype=torch.float64)
    owner = torch.searchsorted(starts, tensor.contiguous(), right=True) - 1
    if not tensor.numel() or int(owner.min()) < 0:
        return None
    for along in range(max(1, tensor.ndim)):
        if not tensor.ndim:
            groups = [(int(owner), tensor)]
        else:
            columns = owner.movedim(along, 0).reshape(tensor.shape[along], -1)
            if not bool((columns == columns[:, :1]).all()):
                continue
            runs = itertools.groupby(range(len(columns)), key=lambda k: int(columns[k, 0]))
            spans = [(number, list(run)) for number, run in runs]
            groups = [(n, tensor.narrow(along, run[0], len(run))) for n, run in spans]
        sources = [_source(part, *owners[number]) for number, part in groups]
        if all(s is not None for s in sources):
            return along, [s for s in sources if s is not None]
    return None


def _source(part: Tensor, name: str, start: int, shape: tuple[int, ...]) -> _Source | None:
    """How a part on disk lies in the module's tensor; None where it is not a block of it."""
    flat = part.long() - start
    places: list[tuple[int | None, int, int]] = []
    for k in range(len(shape)):
        stride = 1
        for n in shape[k + 1 :]:
            stride *= n
        numbers = flat // stride % shape[k]
        moving = [
            axis for axis in range(part.ndim)
            if not bool((numbers == numbers.narrow(axis, 0, 1)).all())
        ]  # fmt: skip
        if len(moving) > 1:
            return None
        if not moving:
            number = int(numbers.flatten()[0])
            places.append((None, number, number + 1))
            continue
        run = numbers.movedim(moving[0], 0).reshape(part.shape[moving[0]], -1)[:, 0].tolist()
        if run != list(range(run[0], run[0] + len(run))):
            return None
        places.append((moving[0], run[0], run[-1] + 1))
    axes = [axis for axis, _, _ in places if axis is not None]
    return _Source(name, tuple(places)) if len(set(axes)) == len(axes) else None


def _of_source(symmetry: Symmetry, source: _Source, shape: Sequence[int]) -> Layout | None:
    layout = symmetry.tensors[source.name]
    axes: list[Axis] = [Axis(((Factor(None, 1),),)) for _ in shape]
    stack, member = "", 0
    for axis, (along, first, last) in zip(layout.axes, source.places, strict=True):
        if along is not None:
            part = _range(axis, first, last)
            if part is None:
                return None
            axes[along] = part
            continue
        factors = axis.parts[0]
        if len(axis.parts) != 1 or len(factors) != 1 or not isinstance(factors[0], Factor):
            return None
        if axis.size > 1 and factors[0].group is not None:
            if stack:
                return None
            stack, member = factors[0].group, first
    return Layout(tuple(shape), tuple(axes), stack=stack, member=member)


def _range(axis: Axis, first: int, last: int) -> Axis | None:
    """The parts of an axis that lie within a range; None where it cuts one."""
    if (first, last) == (0, axis.size):
        return axis
    kept, at = [], 0
    for product in axis.parts:
        size = Axis((product,)).size
        if first <= at and at + size <= last:
            kept.append(product)
        elif at < last and at + size > first:
            return None
        at += size
    return Axis(tuple(kept)) if kept else None


def _with_siblings(tensors: Mapping[str, Layout], symmetry: Symmetry) -> dict[str, Layout]:
    """Slices of one stacked tensor are told each other's names, which differ in their number."""
    families: dict[tuple[Any, ...], dict[int, str]] = {}
    for name, layout in tensors.items():
        parts = name.split(".")
        for at, part in enumerate(parts) if layout.stack else ():
            if part == str(layout.member):
                key = (at, *parts[:at], *parts[at + 1 :], layout.stack, layout.axes)
                families.setdefault(key, {})[layout.member] = name
    out = dict(tensors)
    for members in families.values():
        names = tuple(members[n] for n in sorted(members))
        if len(names) == symmetry.groups[tensors[names[0]].stack].size:
            for name in names:
                out[name] = replace(out[name], siblings=names)
    return out
