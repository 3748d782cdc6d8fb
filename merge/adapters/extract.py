"""The difference of a model to its base as a LoRA: factors of matrices, all else stored whole.

A matrix whose difference is a sum of products of thin matrices, as after merging adapters, is
decomposed from these exactly, and nothing of model or base is read for it. Any other is computed,
one at a time, and decomposed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.adapters.changes import Changes, Choice, Measure, find_changes
from merge.adapters.decompose import Budget, Evaluate, Found, pooled_ranks, spectra
from merge.adapters.report import ExtractReport, ModuleReport
from merge.families.roles import role_of
from merge.families.turned import stored_turned
from merge.ir.checkpoint import Checkpoint, some

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Extracted", "Low", "extract"]

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Low:
    """B and A of one weight, as peft stores them. turned: the weight is stored as (in, out)."""

    left: Tensor
    right: Tensor
    turned: bool = False
    embedding: bool = False

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])


@dataclass(frozen=True, slots=True)
class Extracted:
    """Factors by the weight's name, what is stored beside them, and what was kept."""

    low: Mapping[str, Low]
    changes: Changes
    report: ExtractReport


def extract(
    model: Checkpoint,
    base: Checkpoint,
    *,
    evaluate: Evaluate,
    measure: Measure,
    budget: Budget,
    choice: Choice,
    task: str | None,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] | None = None,
) -> Extracted:
    """The difference ``model - base``, decomposed.

    evaluate, measure: what computes expressions. task: PEFT's word for it. dtype: of the factors;
    float32 if not given. progress: called with the name of each matrix that is done.
    """
    changes = find_changes(model, base, measure, choice, task)
    rows = {row.module: row for row in _beside(model, changes)}
    matrices = dict(changes.matrices)
    ranks: dict[str, int] = {}
    if budget.energy is not None:
        for name, (rank, total) in pooled_ranks(matrices, evaluate, budget).items():
            ranks[name] = rank
            if not rank:
                del matrices[name]
                if total:
                    shape = model.tensors[name].shape
                    rows[name] = ModuleReport(name, "svd", shape, 0, 0.0, 1.0, total)
    low: dict[str, Low] = {}
    for found in spectra(matrices, evaluate, lambda n: ranks.get(n, budget.rank)):
        if found.spectrum.total:
            most = ranks.get(found.name, budget.rank)
            made, rows[found.name] = _kept(model, found, most, dtype)
            low[found.name] = made
        if progress is not None:
            progress(found.name)
    lost = [row.module for row in rows.values() if row.rank == 0]
    notes = (f"not in the adapter, though they differ: {some(lost)}",) if lost else ()
    place = {n: i for i, n in enumerate(model.tensors)}
    order = sorted(rows.values(), key=lambda r: place.get(r.module, len(place)))
    return Extracted(_even(model, low), changes, ExtractReport(tuple(order), notes))


def _kept(
    model: Checkpoint, found: Found, most: int | None, dtype: torch.dtype | None
) -> tuple[Low, ModuleReport]:
    """The factors of one matrix, rounded as they are stored, and what they hold of it."""
    spectrum, shape = found.spectrum, model.tensors[found.name].shape
    rank = len(spectrum.values) if most is None else min(most, len(spectrum.values))
    left, right = spectrum.factors(rank)
    if dtype is not None:
        left, right = left.to(dtype), right.to(dtype)
    held = float(spectrum.squares[:rank].sum()) / spectrum.total
    error = found.lost(left, right) / math.sqrt(spectrum.total)
    row = ModuleReport(found.name, found.how, shape, rank, min(1.0, held), error, spectrum.total)
    embedding = role_of(found.name, shape) in ("embedding", "position") and len(shape) == 2
    turned = embedding or stored_turned(found.name, model.side.config)
    if turned:
        left, right = right.T, left.T
    if len(shape) > 2:
        left = left.reshape(*left.shape, *(1 for _ in shape[2:]))
        right = right.reshape(rank, *shape[1:])
    return Low(left.contiguous(), right.contiguous(), turned, embedding), row


def _beside(model: Checkpoint, changes: Changes) -> list[ModuleReport]:
    """Rows for what is stored as it is, and for what is not kept."""
    rows = []
    for name in changes.biases:
        square = changes.squares[name]
        rows.append(ModuleReport(name, "bias", model.tensors[name].shape, square=square))
    for module in changes.whole:
        inside = [n for n in model.tensors if n.startswith(f"{module}.")]
        square = math.fsum(changes.squares.get(n, 0.0) for n in inside)
        shape = max((model.tensors[n].shape for n in inside), key=math.prod)
        rows.append(ModuleReport(module, "whole", shape, square=square))
    for name, why in changes.lost.items():
        square = changes.squares.get(name, 0.0)
        rows.append(ModuleReport(name, why, model.tensors[name].shape, 0, 0.0, 1.0, square))
    return rows


def _even(model: Checkpoint, low: dict[str, Low]) -> dict[str, Low]:
    """All experts with factors of one rank, filled up with zeros: libraries stack them."""

    changed = [n for n in low if _EXPERT.search(n)]
    if not changed:
        return low
    rank = max(low[n].rank for n in changed)
    like = low[changed[0]].left
    out = dict(low)
    for name, expr in model.tensors.items():
        if not _EXPERT.search(name) or len(expr.shape) != 2 or not name.endswith(".weight"):
            continue
        rows, columns = expr.shape
        left, right = like.new_zeros(rows, rank), like.new_zeros(rank, columns)
        if name in low:
            left[:, : low[name].rank] = low[name].left
            right[: low[name].rank] = low[name].right
        out[name] = Low(left, right)
    return {n: out[n] for n in model.tensors if n in out}
