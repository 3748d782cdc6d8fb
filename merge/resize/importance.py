"""How much each unit of a group matters, by the weights that write and read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from merge.alignment.taps import taps_of, watched
from merge.errors import PlanError
from merge.symmetry.axes import Axis, Factor, factors_of
from merge.symmetry.roles import is_read
from merge.symmetry.symmetry import Symmetry
from merge.transport.coupling import Roles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

__all__ = ["Readable", "activation_importance", "weight_importance"]


class Readable(Protocol):
    """Tensors by name, one at a time."""

    def read(self, name: str) -> Tensor: ...


def weight_importance(
    symmetry: Symmetry, roles: Roles, tensors: Readable, groups: Collection[str]
) -> dict[str, NDArray[np.float64]]:
    """For each group, by unit, the root of (what writes it) times (what reads it).

    Both are sums over tensors of the unit's share of that tensor's squares, so that tensors of any
    scale count alike, and the score does not change when a unit is written larger and read smaller.
    A unit that is only written, or only read, counts by that. Each tensor is read once.
    """
    import numpy as np

    written = {g: np.zeros(symmetry.groups[g].size) for g in groups}
    read = {g: np.zeros(symmetry.groups[g].size) for g in groups}
    for name, layout in symmetry.tensors.items():
        present = [g for g in groups if g in layout.groups()]
        if not present:
            continue
        squares = np.square(tensors.read(name).double().numpy())
        total = float(squares.sum()) or 1.0
        for group, inside, part in _shares(squares, layout.axes, roles, name, present):
            side = read if inside else written
            side[group] += part / total
        if layout.stack in present:
            written[layout.stack][layout.member] += 1.0
    found = {}
    for group in groups:
        both = written[group].any() and read[group].any()
        product = written[group] * read[group] if both else (written[group] + read[group]) ** 2
        found[group] = np.sqrt(product)
    return found


def activation_importance(
    module: nn.Module,
    symmetry: Symmetry,
    groups: Collection[str],
    run: Callable[[Any], object],
    batches: Sequence[Any],
    rows: Callable[[Any, Tensor], Tensor],
) -> dict[str, NDArray[np.float64]]:
    """For each group, by unit, the mean magnitude of what layers read from it.

    symmetry: under the module's names. run: the network on a batch. rows: from a batch and an
    activation, channels last, to the rows that count. A group that several layers read, as the
    residual stream, has the sum over them, each in units of its own mean. PlanError for a group
    that no layer's input shows.
    """
    import numpy as np
    import torch

    taps = [t for t in taps_of(module, symmetry) if not t.output]
    taps = [t for t in taps if any(f.group in groups for f in factors_of(t.axis))]
    sums = [np.zeros(t.axis.size) for t in taps]
    current: list[Any] = [None]

    def see(number: int, value: Tensor) -> None:
        found = rows(current[0], value.movedim(taps[number].channel, -1))
        sums[number] += found.double().abs().sum(0).cpu().numpy()

    with torch.no_grad(), watched(module, taps, see):
        for batch in batches:
            current[0] = batch
            run(batch)
    found = {g: np.zeros(symmetry.groups[g].size) for g in groups}
    for tap, total in zip(taps, sums, strict=True):
        scaled = total / (total.mean() or 1.0)
        for part, factors in _taken_apart(scaled, [tap.axis]):
            for i, factor in enumerate(factors):
                if factor.group in groups:
                    rest = tuple(j for j in range(part.ndim) if j != i)
                    found[str(factor.group)] += part.sum(axis=rest)
    unseen = [g for g in groups if not found[g].any()]
    if unseen:
        raise PlanError(
            "no layer shows the activations of a group",
            group=unseen[0],
            expected="a torch layer that reads it",
            do="judge units by their weights",
        )
    return found


def _shares(
    squares: NDArray[np.float64],
    axes: tuple[Axis, ...],
    roles: Roles,
    name: str,
    groups: Collection[str],
) -> list[tuple[str, bool, NDArray[np.float64]]]:
    """For each place of a group in a tensor: the group, whether it is read there, and the sums."""
    out = []
    for k, axis in enumerate(axes):
        if not any(f.group in groups for f in factors_of(axis)):
            continue
        along = squares.sum(axis=tuple(j for j in range(squares.ndim) if j != k))
        for part, factors in _taken_apart(along, [axis]):
            for i, factor in enumerate(factors):
                if factor.group in groups:
                    rest = tuple(j for j in range(part.ndim) if j != i)
                    inside = is_read(factor, k in roles.inputs[name], roles.flipped)
                    out.append((str(factor.group), inside, part.sum(axis=rest)))
    return out


def _taken_apart(
    values: NDArray[np.float64], dims: Sequence[Axis | Factor]
) -> Iterator[tuple[NDArray[np.float64], list[Factor]]]:
    """Parts of ``values`` whose axes are one factor each: sums apart, products as axes."""
    for k, axis in enumerate(dims):
        if not isinstance(axis, Axis):
            continue
        at = 0
        for product in axis.parts:
            sizes = [f.size for f in product]
            piece = values[(slice(None),) * k + (slice(at, at + math.prod(sizes)),)]
            at += math.prod(sizes)
            shape = (*values.shape[:k], *sizes, *values.shape[k + 1 :])
            yield from _taken_apart(piece.reshape(shape), [*dims[:k], *product, *dims[k + 1 :]])
        return
    yield values, [f for f in dims if isinstance(f, Factor)]
