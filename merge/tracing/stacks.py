"""Which numbers in tensor names count the layers of a stack, and which tell parts apart.

Layers are alike: what stands behind their numbers is mostly the same. The parts of a sequence, such
as a convolution and a norm, are not, and their numbers are part of their names.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from merge.symmetry.patterns import LETTERS

__all__ = ["Stacks"]

_ALIKE = 0.4
"""The least share of names that neighbouring layers have in common."""


@dataclass(frozen=True, slots=True)
class Stacks:
    """The paths before numbers that count layers, their own numbers replaced by '#'."""

    prefixes: frozenset[str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Stacks:
        """The stacks in tensor names.

        >>> sorted(Stacks.of(["h.0.w", "h.1.w", "s.0.weight", "s.1.bias"]).prefixes)
        ['h']
        """
        behind: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for name in names:
            parts = name.split(".")
            for at, part in enumerate(parts):
                if part.isdigit():
                    behind[".".join(parts[:at])][part].add(".".join(parts[at + 1 :]))
        votes: dict[str, list[float]] = defaultdict(list)
        for prefix, members in behind.items():
            ordered = [members[n] for n in sorted(members, key=int)]
            for one, other in itertools.pairwise(ordered):
                share = len(one & other) / len(one | other)
                votes[_loose(prefix)].append(share)
        return cls(frozenset(p for p, v in votes.items() if sum(v) / len(v) > _ALIKE))

    def is_layer(self, parts: list[str], at: int) -> bool:
        """Whether the component ``at`` of a name is the number of a layer."""
        return parts[at].isdigit() and _loose(".".join(parts[:at])) in self.prefixes

    def numbers(self, path: str) -> tuple[tuple[str, int], ...]:
        """The numbers of layers in a path, with their letters.

        >>> Stacks(frozenset(["h"])).numbers("h.3.mlp.0")
        (('i', 3),)
        """
        parts = path.split(".")
        return tuple(
            (LETTERS[count], int(parts[at]))
            for count, at in enumerate(_digits(parts))
            if self.is_layer(parts, at)
        )

    def loose(self, path: str) -> str:
        """The path with the numbers of layers replaced by '#'."""
        parts = path.split(".")
        return ".".join("#" if self.is_layer(parts, at) else p for at, p in enumerate(parts))


def _digits(parts: list[str]) -> list[int]:
    return [at for at, part in enumerate(parts) if part.isdigit()]


def _loose(path: str) -> str:
    return ".".join("#" if p.isdigit() else p for p in path.split("."))
