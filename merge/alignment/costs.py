"""What it is worth to match coordinates: products of the first network's tensors with the second's.

For a group g and everything else fixed, the inner product of network A with network B aligned is
``sum_i C[i, p[i]]``: it is linear in the permutation p of g. C sums, over all places of g in all
tensors, ``unfold(A) @ unfold(B)'``, where each tensor is unfolded into rows by g, B with its other
axes already aligned (weight matching of Ainsworth et al. 2023, arXiv:2209.04836). Where groups
depend on g, C has one block for each pair of indices of g, in which those are matched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.alignment.families import Tree, members
from merge.symmetry.axes import Axis, Factor
from merge.symmetry.symmetry import Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Part", "Term", "parts_of", "piled", "scores_of", "terms_of", "views"]

_BLOCK = 1 << 22
"""Elements of a product that are computed in one go, before they are added up in float64."""


def views(
    tensor: Tensor, axes: Sequence[Axis | Factor]
) -> Iterator[tuple[Tensor, tuple[Factor, ...]]]:
    """The blocks of a tensor, one for each choice of a part in every sum, an axis for each factor.

    Nothing is copied.
    """
    for k, axis in enumerate(axes):
        if not isinstance(axis, Axis):
            continue
        at = 0
        for product in axis.parts:
            sizes = [f.size for f in product]
            piece = _split(tensor.narrow(k, at, math.prod(sizes)), k, sizes)
            yield from views(piece, [*axes[:k], *product, *axes[k + 1 :]])
            at += math.prod(sizes)
        return
    yield tensor, tuple(f for f in axes if isinstance(f, Factor))


def _split(tensor: Tensor, k: int, sizes: Sequence[int]) -> Tensor:
    """Axis k as several; nothing is copied."""
    return tensor.view(*tensor.shape[:k], *sizes, *tensor.shape[k + 1 :])


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A block of one tensor in both networks, the second aligned but for the groups in question.

    groups: of each axis the group in question, or None for an axis over which products are summed.
    unsigned: the place follows no signs of its group. Several tensors, one for each index of a
    stack, are one block with the stack's axis first.
    """

    a: Tensor | Sequence[Tensor]
    b: Tensor | Sequence[Tensor]
    groups: tuple[str | None, ...]
    unsigned: bool = False

    def size(self, sizes: Mapping[str, int]) -> int:
        """Rows of the block when it is unfolded by its groups."""
        return math.prod(sizes[g] for g in self.groups if g)

    def at(self, group: str, i: int, j: int) -> Term:
        """The block at index i of a group in the first network, and j in the second."""
        k = self.groups.index(group)
        rest = self.groups[:k] + self.groups[k + 1 :]
        if not k and isinstance(self.a, Sequence) and isinstance(self.b, Sequence):
            return Term(self.a[i], self.b[j], rest, self.unsigned)
        a, b = _whole(self.a), _whole(self.b)
        return Term(a.select(k, i), b.select(k, j), rest, self.unsigned)

    def mean_over(self, kept: str) -> Term:
        """The block with all other groups averaged out, so that its products are their expectation.

        Over uniformly random permutations of a group of n, the inner product's expectation is that
        of the sums over the group, divided by n.
        """
        k = self.groups.index(kept)
        others = [i for i, g in enumerate(self.groups) if g and i != k]
        if not others:
            return self

        def averaged(blocks: Tensor | Sequence[Tensor]) -> Any:
            if isinstance(blocks, Sequence):
                return [averaged_one(b, [i - 1 for i in others]) for b in blocks]
            return averaged_one(blocks, others)

        def averaged_one(block: Tensor, axes: list[int]) -> Tensor:
            count = math.prod(block.shape[i] for i in axes)
            return block.to(_compute(block)).sum(axes) / math.sqrt(count)

        rest = tuple(g for i, g in enumerate(self.groups) if i not in others)
        return Term(averaged(self.a), averaged(self.b), rest, self.unsigned)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Products of all pairs of coordinates: axes of ``groups`` in the first network, then in the
    second."""

    groups: tuple[str, ...]
    products: NDArray[Any]


def terms_of(
    layout: Layout, a: Tensor, b: Tensor, tree: Tree, current: Mapping[str, Any]
) -> Iterator[Term]:
    """The blocks of one tensor in which the groups of ``tree`` stand.

    b: aligned but for those groups. Where the root stands twice, as in a map from the residual
    stream to itself, the block comes once for each place, the other one aligned by ``current``: the
    objective's derivative.
    """
    wanted = {t.group for t in members(tree)}
    for (x, factors), (y, _) in zip(views(a, layout.axes), views(b, layout.axes), strict=True):
        names = tuple(f.group if f.group in wanted else None for f in factors)
        places = [k for k, name in enumerate(names) if name == tree.group]
        if not places and layout.stack != tree.group:
            continue
        if tree.below and any(name and names.count(name) > 1 for name in names):
            continue  # not linear in the heads' order, and no head's matching would be exact
        for k in places if len(places) > 1 else [-1]:
            groups, aligned = names, y
            for other in places if k >= 0 else []:
                if other != k:
                    groups = (*groups[:other], None, *groups[other + 1 :])
                    aligned = aligned.index_select(other, _index(current[tree.group], aligned))
            place = k if k >= 0 else (places[0] if places else 0)
            yield Term(x, aligned, groups, factors[place].form == "|" if factors else False)


def piled(group: str, terms: Sequence[Term]) -> Term:
    """The blocks of the tensors of a stack, in order, as one with the stack's group first."""
    first = terms[0]
    a, b = ([getattr(t, side) for t in terms] for side in ("a", "b"))
    return Term(a, b, (group, *first.groups), first.unsigned)


def _index(order: Any, like: Tensor) -> Tensor:
    import torch

    return torch.as_tensor(getattr(order, "index", order).copy(), device=like.device)


def scores_of(terms: Iterable[Term], group: str, total: NDArray[np.float64]) -> None:
    """Add to ``total`` (n, n) what the terms of a group are worth on which no other depends.

    Products are computed in float32 (float64 for float64 tensors), some rows at a time.
    """
    for term in terms:
        left, right = _unfolded(term, (group,))
        step = max(1, _BLOCK // len(total))
        for at in range(0, len(total), step):
            block = left[at : at + step] @ right.T
            total[at : at + step] += block.cpu().numpy()


def parts_of(terms: Sequence[Term]) -> list[Part]:
    """The products of all pairs of coordinates in each term, those of equal groups added up."""
    found: dict[tuple[str, ...], Any] = {}
    for term in terms:
        groups = tuple(g for g in term.groups if g)
        order = tuple(sorted(groups))
        left, right = _unfolded(term, order)
        block = left @ right.T
        found[order] = block if order not in found else found[order] + block
    sizes = {g: _size(t, g) for t in terms for g in t.groups if g}
    shapes = {order: [sizes[g] for g in order] * 2 for order in found}
    return [Part(o, block.cpu().numpy().reshape(shapes[o])) for o, block in found.items()]


def _size(term: Term, group: str) -> int:
    k = term.groups.index(group)
    stacked = not k and isinstance(term.a, Sequence)
    return len(term.a) if stacked else int(_whole(term.a).shape[k])


def _unfolded(term: Term, order: Sequence[str]) -> list[Tensor]:
    """Both blocks as matrices of one type: a row for each choice of indices of the groups."""
    import torch

    front = [term.groups.index(g) for g in order]
    found = []
    for tensor in map(_whole, (term.a, term.b)):
        moved = tensor.movedim(front, list(range(len(front))))
        found.append(moved.reshape(math.prod(moved.shape[: len(front)]), -1))
    wide = torch.promote_types(*map(_compute, found))
    return [x.to(wide) for x in found]


def _whole(block: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(block, Sequence):
        return block
    import torch

    return torch.stack(list(block))


def _compute(tensor: Tensor) -> Any:
    import torch

    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
