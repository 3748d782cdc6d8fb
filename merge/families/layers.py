"""Which layer a tensor belongs to, from its name alone.

The first run of digits between dots numbers the layer; what stands before it names the stack:
``model.layers.3.mlp.up_proj.weight`` is layer 3 of stack ``model.layers``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Layers"]

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Layers:
    """The stacks of a checkpoint: stack name to number of layers."""

    stacks: Mapping[str, int]

    @classmethod
    def of(cls, names: Iterable[str]) -> Layers:
        """Infer the stacks from tensor names.

        >>> Layers.of(["emb", "h.0.w", "h.1.w"]).stacks
        {'h': 2}
        """
        stacks: dict[str, int] = {}
        for name in names:
            if (found := _split(name)) is not None:
                stack, index = found
                stacks[stack] = max(stacks.get(stack, 0), index + 1)
        return cls(stacks)

    def position(self, name: str) -> float:
        """Depth of a tensor in its stack, in [0, 1]: where a gradient is read.

        Layer i of n is at i / (n - 1), the layer of a one-layer stack at 1, and what is in no layer
        (embeddings, final norm, head) at 0: that is what published recipes were made with.
        """
        found = _split(name)
        if found is None:
            return 0.0
        stack, index = found
        count = self.stacks[stack]
        return index / (count - 1) if count > 1 else 1.0


def _split(name: str) -> tuple[str, int] | None:
    match = _NUMBER.search(name)
    return None if match is None else (name[: match.start()], int(match[1]))
