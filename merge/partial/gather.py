"""What comes into a joined network's linear maps, and what they should give, by its parents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError
from merge.partial.fit import Normal
from merge.statistics.grams import watched
from merge.statistics.layers import Layer, masks_of
from merge.statistics.runs import run

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Wanted", "normals", "run_order"]

_ROWS = 1 << 13
"""Rows that are multiplied at a time: their products are added up in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """One linear map of the joined network. The lists have an entry for each parent.

    layers: the map there. inputs: from that parent's inputs to the joined ones, (in', in). outputs:
    from its inputs to the wanted outputs, (out', in). shift: their sum's constant, (out',). own:
    the map in the joined network, whose own inputs are taken; None where the parents' are.
    """

    name: str
    layers: tuple[Layer, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    shift: Tensor
    own: Layer | None = None


class _Reached(Exception):
    """No error: a network has run as far as it should."""


def normals(
    wanted: Sequence[Wanted],
    parents: Sequence[nn.Module],
    batches: Sequence[Any],
    merged: nn.Module | None = None,
) -> dict[str, Normal]:
    """Of each map the moments of inputs and targets over all batches, padding left out.

    merged: the joined network, where its own inputs are taken: all networks are run until the only
    map that is wanted then. PlanError where the parents do not see the same rows, and for maps
    never reached.
    """
    import torch

    sums: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        stop = merged is not None
        seen = [_rows(m, [w.layers[k] for w in wanted], batch, stop) for k, m in enumerate(parents)]
        joined: Mapping[str, Tensor] = {}
        if merged is not None:
            (only,) = wanted
            assert only.own is not None
            joined = _rows(merged, [only.own], batch, stop)
        for one in wanted:
            rows = [found.get(layer.weight) for found, layer in zip(seen, one.layers, strict=True)]
            given = [r for r in rows if r is not None]
            if len(given) < len(parents):
                continue
            if len({len(r) for r in given}) > 1:
                raise PlanError(
                    "the two networks do not see as many rows in a layer",
                    layer=one.name,
                    found=[len(r) for r in given],
                )
            own = None if one.own is None else joined.get(one.own.weight)
            _add(sums.setdefault(one.name, []), one, given, own)
            counts[one.name] = counts.get(one.name, 0) + len(given[0])
    missing = [w.name for w in wanted if w.name not in counts]
    if missing:
        raise PlanError(
            "the data never reaches a layer that is to be fitted",
            layer=missing[0],
            do="give data that uses the whole network, or merge without least squares",
        )
    found = {}
    for name, (gram, cross, energy) in sums.items():
        count = torch.tensor(float(counts[name]), dtype=torch.float64)
        found[name] = Normal(gram / count, cross / count, energy / count)
    return found


def _add(sums: list[Tensor], one: Wanted, rows: Sequence[Tensor], own: Tensor | None) -> None:
    import torch

    for at in range(0, len(rows[0]), _ROWS):
        block = [r[at : at + _ROWS].double() for r in rows]
        z = own[at : at + _ROWS].double() if own is not None else _mapped(block, one.inputs)
        y = _mapped(block, one.outputs) + one.shift
        z = torch.cat([z, z.new_ones(len(z), 1)], 1)
        new = [z.T @ z, y.T @ z, (y * y).sum(0)]
        if not sums:
            sums.extend(new)
        else:
            for total, part in zip(sums, new, strict=True):
                total += part


def _mapped(rows: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    first, *rest = (r @ m.T for r, m in zip(rows, maps, strict=True))
    return sum(rest, first)


def _rows(
    module: nn.Module, layers: Sequence[Layer], batch: Any, stop: bool = False
) -> dict[str, Tensor]:
    """What comes into each layer as rows; of a layer that is used several times, all of them.

    stop: after the first call of a layer.
    """
    import torch

    masks = masks_of(batch)
    found: dict[str, list[Tensor]] = {}

    def see(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(layer.weight, []).append(layer.rows(args, kwargs, masks).detach())
        if stop:
            raise _Reached

    with watched(module, layers, see), suppress(_Reached):
        run(module, batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def run_order(module: nn.Module, layers: Sequence[Layer], batch: Any) -> list[str]:
    """The names of the layers' weights in the order of their first calls."""
    order: dict[str, None] = {}
    note: Callable[..., None] = lambda layer, _args, _kwargs: order.setdefault(layer.weight)  # noqa: E731
    with watched(module, layers, note):
        run(module, batch)
    return list(order)
