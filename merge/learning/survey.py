"""Base and differences gone through once before anything is learned: what moves, what is broken."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.errors import SourceError
from merge.learning.store import Differences

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Survey", "survey"]


@dataclass(frozen=True, slots=True)
class Survey:
    """empty: tensors that no expert has moved. digest: a text that stands for all the numbers."""

    empty: frozenset[str]
    digest: str


def survey(source: Differences, names: Iterable[str], experts: Sequence[str]) -> Survey:
    """One pass over base and differences, a tensor at a time.

    SourceError, with tensor and expert, for numbers that are not finite. The digest is made of sums
    of bits, which no number of threads changes.
    """
    empty = set()
    digest = hashlib.blake2b(digest_size=12)
    for name in names:
        value = source.base(name)
        _check(value, name, model="base")
        digest.update(f"{name} {_bits(value)}".encode())
        del value
        moved = False
        for number, expert in enumerate(experts):
            delta = source.delta(number, name)
            _check(delta, name, expert=expert)
            digest.update(f" {_bits(delta)}".encode())
            moved = moved or bool(delta.any())
        if not moved:
            empty.add(name)
    return Survey(frozenset(empty), digest.hexdigest())


def _bits(value: Tensor) -> int:
    """The sum of the numbers' bits, exact whatever the order."""
    import torch

    word = {4: torch.int32, 8: torch.int64}[value.element_size()]
    return int(value.contiguous().view(word).sum(dtype=torch.int64))


def _check(value: Tensor, name: str, **whose: str) -> None:
    if bool(value.sum().isfinite()) or bool(value.isfinite().all()):
        return
    count = int((~value.isfinite()).sum())
    what = "a base" if "model" in whose else "an expert"
    raise SourceError(
        f"{what} has numbers that are not finite",
        tensor=name,
        found=f"{count} of {value.numel()} are NaN or infinite",
        do="leave that model out, or save it anew from a run that did not diverge",
    ).at(**whose)
