"""Layers that an adapter's model has several times: each of them gets changes of its own."""

from __future__ import annotations

from dataclasses import replace

from merge.adapters.config import AdapterConfig
from merge.errors import PlanError
from merge.families.config import relayer
from merge.families.layers import Layers, place_of
from merge.ir.assembly import select
from merge.ir.checkpoint import Checkpoint

__all__ = ["replicated"]

_STACKS = ("layers", "layer", "h")


def replicated(base: Checkpoint, config: AdapterConfig) -> Checkpoint:
    """``base`` with its layers in the spans that the config lists; as it is where it lists none."""
    if not config.replication:
        return base
    order = [i for first, end in config.replication for i in range(first, end)]
    stacks = Layers.of(base.tensors).stacks
    found = [s for s in stacks if s.rpartition(".")[2] in _STACKS]
    if len(found) != 1 or max(order) >= stacks[found[0]]:
        raise PlanError(
            "an adapter repeats layers that the model does not have",
            file=config.file,
            key="layer_replication",
            found=", ".join(f"{s}: {n} layers" for s, n in stacks.items()) or "no layers",
            expected=f"one stack of at least {max(order) + 1} layers",
        )
    stack = found[0]
    names: dict[str, str] = {}
    for name in base.tensors:
        at = place_of(name)
        if at is None or at[0] != stack:
            names[name] = name
            continue
        for new, old in enumerate(order):
            if old == at[1]:
                names[f"{stack}.{new}{at[2]}"] = name
    data = base.side.config
    changed = relayer(data, stack, stacks[stack], [(data, old) for old in order])
    if not changed.counted:
        raise PlanError(
            "config.json does not count the layers that an adapter repeats", model=base.label
        )
    return replace(select(base, names), side=base.side.with_config(changed.config))
