"""Examples as they are found, before anything is decoded: value, label, and where they stand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge.errors import SourceError
from merge.streams.spec import PARTS, DataSpec

__all__ = ["Example", "divide", "part_of", "shuffled"]


@dataclass(frozen=True, slots=True)
class Example:
    """One example. key: bytes that stand for its content. part: where its file says which."""

    value: Any
    label: str | int | None
    key: bytes
    part: str | None = None
    where: Mapping[str, object] = field(default_factory=dict)


def part_of(key: bytes, seed: int, shares: Mapping[str, float]) -> str | None:
    """The part that the hash of an example falls into; None for what no share takes.

    It depends on content and seed alone: equal examples are in one part, and none changes its part
    when others are added.
    """
    place = int.from_bytes(_hash(key, seed, b"split"), "big") / 2**64
    upto = 0.0
    for part, share in shares.items():
        upto += share
        if place < upto:
            return part
    return None


def divide(examples: Iterable[Example], spec: DataSpec) -> dict[str, list[Example]]:
    """The examples of each part: as their file says, else by hash; at most ``limit`` in each.

    What is left out of a limit is decided by hash too, so that it does not depend on the order.
    """
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    for example in examples:
        part = example.part
        if part is None:
            part = part_of(example.key, spec.seed, spec.shares)
        if part is not None:
            parts[part].append(example)
    for part, found in parts.items():
        if spec.limit is not None and len(found) > spec.limit:
            order = sorted(
                range(len(found)), key=lambda i: (_hash(found[i].key, spec.seed, b"limit"), i)
            )
            parts[part] = [found[i] for i in sorted(order[: spec.limit])]
    if not any(parts.values()):
        raise SourceError("there is no data", file=spec.path, found="no examples")
    return parts


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples in an order of the seed, in which each stretch has all classes in their shares.

    Of a class of n the j-th is put at (j + u) / n, u in [0, 1) by hash: a batch of one class, on
    which entropy collapses, does not come about.
    """
    by_class: dict[object, list[int]] = {}
    for i, example in enumerate(examples):
        by_class.setdefault(example.label, []).append(i)
    placed: list[tuple[float, int]] = []
    for members in by_class.values():
        drawn = sorted(members, key=lambda i: (_hash(examples[i].key, seed, b"order"), i))
        for j, i in enumerate(drawn):
            u = int.from_bytes(_hash(examples[i].key, seed, b"place"), "big") / 2**64
            placed.append(((j + u) / len(members), i))
    return [examples[i] for _, i in sorted(placed)]


def _hash(key: bytes, seed: int, purpose: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=8, key=b"%d" % seed, person=purpose).digest()
