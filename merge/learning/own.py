"""What of a learned merge belongs to one task: its head or layers, and a correction behind one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.errors import PlanError
from merge.learning.network import Job
from merge.learning.surgery import DOWN, UP, corrected

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Own", "built", "own_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """The tensors of a task's network that are not the merged ones.

    tensors: by their names in the network's state dict; those of a correction are `DOWN` and `UP`.
    learned: which of them were learned, the others are the expert's. layer: the one behind which
    the correction is, ``""`` for the network itself, None where there is none. places: where merged
    tensors lie in the network, for those that have another name there, or several.
    """

    task: str
    tensors: Mapping[str, Tensor]
    learned: tuple[str, ...] = ()
    layer: str | None = None
    places: Mapping[str, tuple[str, ...]] | None = None

    @property
    def network(self) -> dict[str, Tensor]:
        """The tensors without those of the correction."""
        return {n: t for n, t in self.tensors.items() if n not in (DOWN, UP)}


def own_of(job: Job, learned: Mapping[str, Tensor]) -> Own:
    """What a task has for itself, once ``learned`` has been learned for it."""
    tensors = {**job.own, **learned}
    places = {n: p for n, p in job.places.items() if p != (n,)}
    return Own(
        job.name,
        {n: t.detach() for n, t in tensors.items()},
        tuple(learned),
        job.layer if DOWN in learned else None,
        places,
    )


def built(module: nn.Module, own: Own, merged: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a task's network with merged tensors, its own, and its correction built in.

    merged: they become the network's. Floats that are the task's own get their type. PlanError
    where the network has a tensor that neither of them has, or of another shape.
    """
    import torch
    from torch import nn

    state = module.state_dict()
    known = dict(own.network)
    for name, inside in {**{n: (n,) for n in merged}, **(own.places or {})}.items():
        known.update({i: merged[name] for i in inside if i in state and i not in known})
    missing = [n for n in state if n not in known]
    extra = [n for n in known if n not in state]
    if missing or extra:
        raise PlanError(
            "a task's network is not the one that was learned in",
            task=own.task,
            tensor=(missing or extra)[0],
            found=f"the network has {len(missing)} tensors more and {len(extra)} less",
            do="give the network that the task was learned in",
        )
    odd = [n for n, t in state.items() if t.shape != known[n].shape]
    if odd:
        raise PlanError(
            "a task's network has tensors of other shapes than those that were learned",
            task=own.task,
            tensor=odd[0],
            found=list(state[odd[0]].shape),
            expected=list(known[odd[0]].shape),
        )
    devices = {t.device for t in state.values() if not t.is_meta}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    kinds = {t.dtype for t in merged.values() if t.is_floating_point()}
    kind = kinds.pop() if len(kinds) == 1 else None

    made: dict[int, Tensor] = {}

    def placed(name: str, tensor: Tensor) -> Tensor:
        floats = tensor.is_floating_point() and kind is not None and name in own.tensors
        if id(tensor) not in made:  # one that is used twice stays one
            wanted = kind if floats else tensor.dtype
            mine = tensor.detach().clone() if name in own.tensors else tensor.detach()
            made[id(tensor)] = mine.to(device, wanted)
        return made[id(tensor)]

    out = copy.deepcopy(module)
    out.load_state_dict({n: placed(n, t) for n, t in known.items()}, assign=True)
    if own.layer is not None:
        down, up = (nn.Parameter(placed(n, own.tensors[n])) for n in (DOWN, UP))
        part = nn.ParameterDict({"down": down, "up": up})
        layers = dict(out.named_modules())
        if own.layer not in layers:
            raise PlanError(
                "a task's network lacks the layer that is corrected",
                task=own.task,
                layer=own.layer,
            )
        layers[own.layer].register_forward_hook(
            lambda _m, _i, found: corrected(found, part["down"], part["up"])
        )
        out.add_module("surgery", part)
    return out.eval()
