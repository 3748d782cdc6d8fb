"""A checkpoint's stack of layers, and the checkpoint with some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from merge.errors import PlanError
from merge.families.config import relayer
from merge.families.layers import Layers, of_stack, place_of
from merge.ir.checkpoint import Checkpoint

__all__ = ["Blocks", "with_layers"]


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


def with_layers(
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
