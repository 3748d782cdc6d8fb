"""Layers merged one after another, each on inputs that come through those already merged.

RegMean++ (arXiv:2508.03121): Gram matrices of the k-th model's data, run through the merged layers
below and that model's own layers of the block at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.statistics.grams import gathered_grams
from merge.statistics.layers import Layer, tied_names

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Member", "merge_in_order"]


@dataclass(frozen=True, slots=True)
class Member:
    """A model with its data.

    own: from names of tensors to its tensors. output: the network on inputs, with any tensors.
    """

    module: nn.Module
    batches: Sequence[Any]
    own: Callable[[Sequence[str]], dict[str, Tensor]]
    output: Callable[[dict[str, Tensor], Any], object]


Solve = Callable[[Sequence["Tensor"], Sequence["Tensor"]], "Tensor"]
"""From each member's weight and Gram matrix to the merged weight."""


def merge_in_order(
    members: Sequence[Member],
    merged: MutableMapping[str, Tensor],
    layers: Sequence[Layer],
    unit_of: Callable[[str], str],
    solve: Solve,
) -> Iterator[str]:
    """Merge the layers' weights into ``merged`` unit by unit; yields each name when it is done.

    merged: a whole network, whose other tensors are as they shall be. unit_of: from a tensor's name
    to that of the unit that is merged at once. Layers that the data does not reach are left.
    """
    order = _units_in_order(members[0], merged, layers, unit_of)
    tied = tied_names(members[0].module)
    for i, unit in enumerate(order):
        inside = [layer for layer in layers if unit_of(layer.weight) == unit]
        after = [layer for layer in layers if unit_of(layer.weight) in order[i + 1 :]]
        every = [n for name in merged if unit_of(name) == unit for n in tied.get(name, [name])]
        names = [n for n in dict.fromkeys(every) if n in merged]
        grams = [_grams(member, dict(merged), names, inside, after) for member in members]
        for weight in dict.fromkeys(layer.weight for layer in inside):
            maps = [member.own([weight])[weight] for member in members]
            found = solve(maps, [g[weight] for g in grams])
            merged.update(dict.fromkeys((n for n in tied[weight] if n in merged), found))
            yield weight


class _Done(BaseException):
    """All inputs of a unit were seen; the rest of the network need not be run."""


def _grams(
    member: Member,
    state: dict[str, Tensor],
    names: Sequence[str],
    inside: Sequence[Layer],
    after: Sequence[Layer],
) -> dict[str, Tensor]:
    """Gram matrices of a unit's layers, which are the member's own in an else merged network."""
    state.update(member.own(names))
    parts = dict(member.module.named_modules())
    left: set[str] = set()

    def run(inputs: Any) -> None:
        left.update(layer.module for layer in inside)
        with suppress(_Done):
            member.output(state, inputs)

    def stop(_part: Any, _args: Any) -> None:
        if not left:
            raise _Done

    with ExitStack() as stack:
        for layer in inside:

            def note(_part: Any, _args: Any, _out: Any, name: str = layer.module) -> None:
                left.discard(name)

            stack.callback(parts[layer.module].register_forward_hook(note).remove)
        for layer in after:
            stack.callback(parts[layer.module].register_forward_pre_hook(stop).remove)
        return gathered_grams(member.module, inside, run, member.batches)


def _units_in_order(
    member: Member,
    state: MutableMapping[str, Tensor],
    layers: Sequence[Layer],
    unit_of: Callable[[str], str],
) -> list[str]:
    """Units in the order in which the network comes to them."""
    import torch

    parts = dict(member.module.named_modules())
    found: dict[str, None] = {}
    with ExitStack() as stack, torch.no_grad():
        for layer in layers:

            def note(_part: Any, _args: Any, unit: str = unit_of(layer.weight)) -> None:
                found.setdefault(unit, None)

            stack.callback(parts[layer.module].register_forward_pre_hook(note).remove)
        member.output(dict(state), member.batches[0])
    return list(found)
