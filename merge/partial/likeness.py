"""How alike the units of two aligned networks are, pair by pair, and of several networks in all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from merge.alignment.costs import views
from merge.alignment.moments import Moments
from merge.alignment.taps import Tap, taps_of, watched
from merge.alignment.weight import STATISTICS
from merge.statistics.runs import run
from merge.symmetry.axes import Factor, factors_of
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

__all__ = ["alike_by_activations", "alike_by_weights", "correlations"]

_SAMPLES = 1 << 14
"""Rows of one activation that are used of a batch at most, evenly spread."""


class Reader(Protocol):
    """Where a network's tensors are read."""

    def read(self, name: str) -> Tensor:
        """The tensor ``name``."""


def alike_by_weights(
    symmetry: Symmetry, a: Reader, b: Reader, groups: Collection[str], names: Collection[str]
) -> dict[str, NDArray[np.float64]]:
    """For each group the cosine of each unit's weights in both networks, over all its places.

    names: the tensors that count; statistics of BatchNorm never do.
    """
    import torch

    sums = {g: torch.zeros(3, symmetry.groups[g].size, dtype=torch.float64) for g in groups}
    for name in names:
        layout = symmetry.tensors[name]
        if name.endswith(STATISTICS) or not set(layout.groups()) & set(groups):
            continue
        pair = [t.read(name).float().contiguous() for t in (a, b)]
        blocks = [list(views(t, layout.axes)) for t in pair]
        for (x, factors), (y, _) in zip(*blocks, strict=True):
            for k, factor in enumerate(factors):
                if factor.group not in sums:
                    continue
                u, v = (t.movedim(k, 0).reshape(factor.size, -1).double() for t in (x, y))
                sums[factor.group] += torch.stack([(u * v).sum(1), (u * u).sum(1), (v * v).sum(1)])
    return {g: _cosine(s) for g, s in sums.items()}


def _cosine(sums: Tensor) -> NDArray[np.float64]:
    product, first, second = sums
    scale = (first * second).sqrt()
    found: NDArray[np.float64] = (product / scale.clamp(min=1e-300)).numpy()
    return found


def alike_by_activations(
    symmetry: Symmetry,
    networks: Sequence[nn.Module],
    batches: Sequence[Any],
    groups: Collection[str],
) -> dict[str, NDArray[np.float64]]:
    """For each group the correlation of each unit's answers in two aligned networks."""
    found = correlations(symmetry, networks, batches, groups)
    sizes = {g: symmetry.groups[g].size for g in found}
    return {g: c[: sizes[g], sizes[g] :].diagonal().copy() for g, c in found.items()}


def correlations(
    symmetry: Symmetry,
    networks: Sequence[nn.Module],
    batches: Sequence[Any],
    groups: Collection[str],
) -> dict[str, NDArray[np.float64]]:
    """For each group the correlations of all units of all networks, one network after another.

    All layers at which a group's channels pass are pooled, each unit brought to mean 0 and
    deviation 1 there by the first batch. Groups that no layer shows are left out.
    """
    import torch

    taps = [
        t for t in taps_of(networks[0], symmetry)
        if {f.group for f in factors_of(t.axis)} & set(groups)
    ]  # fmt: skip
    pools: dict[str, Moments] = {}
    scales: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def scaled(number: int, which: int, value: Tensor) -> Tensor:
        flat = value.movedim(taps[number].channel, -1).flatten(0, -2)
        flat = flat[:: -(-len(flat) // _SAMPLES)].double()
        if (number, which) not in scales:
            deviation, mean = torch.std_mean(flat, 0, correction=0)
            usual = deviation.mean()
            alive = deviation > 1e-6 * usual
            scales[number, which] = mean, torch.where(alive, deviation, usual if usual else 1.0)
        mean, deviation = scales[number, which]
        return (flat - mean) / deviation

    for batch in batches:
        seen: dict[int, list[list[Tensor]]] = {}
        for which, network in enumerate(networks):

            def keep(number: int, value: Tensor, which: int = which, seen: Any = seen) -> None:
                calls = seen.setdefault(number, [[] for _ in networks])
                calls[which].append(scaled(number, which, value))

            with watched(network, taps, keep):
                run(network, batch)
        for number, calls in seen.items():
            for values in zip(*calls, strict=True):
                _pool(taps[number], values, groups, pools)
    return {g: m.correlation().numpy() for g, m in pools.items()}


def _pool(
    tap: Tap, values: Sequence[Tensor], groups: Collection[str], pools: dict[str, Moments]
) -> None:
    """Add one activation of all networks to the moments of the groups that it shows."""
    import torch

    samples = Factor(None, len(values[0]))
    blocks = [list(views(x, (samples, tap.axis))) for x in values]
    for parts in zip(*blocks, strict=True):
        for k, factor in enumerate(parts[0][1]):
            if factor.group in groups:
                flat = [x.movedim(k, -1).reshape(-1, factor.size) for x, _ in parts]
                both = torch.cat(flat, 1)
                pools.setdefault(str(factor.group), Moments()).add(both, both)
