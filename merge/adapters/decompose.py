"""Singular triples of the differences of many matrices, and the rank that each of them is worth."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from merge.adapters.factors import Enough, Spectrum, difference, of_matrix, of_products
from merge.adapters.products import products_of
from merge.ir.derived import LowRank
from merge.ir.expr import Expr

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Budget", "Evaluate", "Found", "pooled_ranks", "spectra"]

Evaluate = Callable[[Mapping[str, Expr]], Iterator[tuple[str, "Tensor"]]]
"""From expressions to their values in float32 or wider, one after another, in order."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much is kept; all, where nothing is said.

    rank: at most so many for a matrix. energy: of the sum of squares over all matrices, the share
    that is kept at least.
    """

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The triples of one matrix. how: ``product`` or ``svd``.

    lost: from factors B and A to the Frobenius norm of the matrix less B A.
    """

    name: str
    spectrum: Spectrum
    how: str
    lost: Callable[[Tensor, Tensor], float]


def spectra(
    matrices: Mapping[str, Expr],
    evaluate: Evaluate,
    most: Callable[[str], int | None],
    enough: Enough | None = None,
) -> Iterator[Found]:
    """Each matrix with its leading triples, one after another: one is in memory at a time.

    most: how many of them at most, by the matrix's name. enough: as in `of_matrix`.
    """
    exact = {n: p for n, e in matrices.items() if (p := products_of(e)) is not None}
    wanted: dict[str, Expr] = {}
    for name, expr in matrices.items():
        for i, (_, product) in enumerate(exact.get(name, ())):
            wanted[f"{name} B{i}"], wanted[f"{name} A{i}"] = product.operands
        if name not in exact:
            wanted[name] = expr
    values = evaluate(wanted)
    for name in matrices:
        if name in exact:
            terms = _terms(exact[name], values)
            yield Found(name, of_products(terms), "product", partial(_lost_of_terms, terms))
            continue
        _, matrix = next(values)
        matrix = matrix.reshape(len(matrix), -1)
        limit = min(most(name) or min(matrix.shape), *matrix.shape)
        found = of_matrix(matrix, most=limit, seed=_seed(name), enough=enough)
        yield Found(name, found, "svd", partial(_lost_of_matrix, matrix))


def _terms(
    products: Sequence[tuple[float, LowRank]], values: Iterator[tuple[str, Tensor]]
) -> list[tuple[float, Tensor, Tensor]]:
    """Coefficient, B and A of each product, as their product is stored."""
    terms = []
    for coefficient, product in products:
        left, right = next(values)[1], next(values)[1]
        left, right = left.reshape(-1, product.rank), right.reshape(product.rank, -1)
        pair = (right.T, left.T) if product.transposed else (left, right)
        terms.append((coefficient, *pair))
    return terms


def _lost_of_terms(
    terms: Sequence[tuple[float, Tensor, Tensor]], left: Tensor, right: Tensor
) -> float:
    return difference([*terms, (-1.0, left, right)])


def _lost_of_matrix(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    step = max(1, (1 << 20) // max(1, matrix.shape[1]))
    squares = []
    for at in range(0, len(matrix), step):
        rest = matrix[at : at + step] - left[at : at + step].float() @ right.float()
        squares.append(float(rest.double().square().sum()))
    return math.sqrt(math.fsum(squares))


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def pooled_ranks(
    matrices: Mapping[str, Expr], evaluate: Evaluate, budget: Budget
) -> dict[str, tuple[int, float]]:
    """The rank of each matrix under an energy budget, and its sum of squares.

    The singular values of all matrices are pooled and the largest kept until their squares hold the
    budget's share of the sum of squares of all (the allocation of ERE).
    """
    assert budget.energy is not None
    share, most = budget.energy, budget.rank

    def holds(squares: Tensor, total: float) -> bool:
        return float(squares.sum()) >= share * total

    squares: dict[str, Tensor] = {}
    totals: dict[str, float] = {}
    for found in spectra(matrices, evaluate, lambda _: most, holds):
        squares[found.name], totals[found.name] = found.spectrum.squares, found.spectrum.total
    least = _least(squares, share * math.fsum(totals.values()))
    short = {
        name: matrices[name]
        for name, values in squares.items()
        if len(values) and float(values[-1]) > least and len(values) != most
    }  # values that were not computed may be larger than some that are kept

    def reaches(squares: Tensor, _: float) -> bool:
        return float(squares[-1]) <= least

    for found in spectra(short, evaluate, lambda _: most, reaches):
        squares[found.name] = found.spectrum.squares
    least = _least(squares, share * math.fsum(totals.values()))
    return {name: (int((s >= least).sum()), totals[name]) for name, s in squares.items()}


def _least(squares: Mapping[str, Tensor], wanted: float) -> float:
    """The smallest of the pooled values that are kept, the largest first, to hold ``wanted``."""
    import torch

    if not squares:
        return 0.0
    pool = torch.cat(list(squares.values())).sort(descending=True).values
    held = torch.cumsum(pool, 0)
    reached = held >= wanted * (1 - 1e-12)
    at = int(reached.int().argmax()) if bool(reached.any()) else len(pool) - 1
    return float(pool[at]) if len(pool) else 0.0
