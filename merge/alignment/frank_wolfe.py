"""All networks moved at once to a common frame, through doubly stochastic matrices.

Frank and Wolfe: the slope of the objective says for each group of each network which permutation it
points to most, an assignment; all move towards theirs by one and the same share. Along that line
the objective is a polynomial whose degree is twice the number of groups that meet in a tensor, four
in most networks, so its largest value is found exactly from that many points and one more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge.alignment.costs import scores_of, terms_of, views
from merge.alignment.families import Tree
from merge.alignment.passes import is_quadratic
from merge.alignment.solvers import assign
from merge.symmetry.action import apply
from merge.symmetry.symmetry import Layout, Symmetry, blocks

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Mapping[str, Tensor]
    Matrices = dict[str, Tensor]

__all__ = ["frank_wolfe", "pairs"]

_GAIN = 1e-6  # relative to the objective: a step that gains less is the last


def pairs(networks: Sequence[Tensors]) -> float:
    """Sum over all pairs of networks of their inner product: half the square of the sum, less the
    squares."""
    total = 0.0
    for name in networks[0]:
        stack = [m[name].double() for m in networks]
        whole = sum(stack[1:], stack[0])
        total += float((whole * whole).sum()) - sum(float((x * x).sum()) for x in stack)
    return total / 2


def frank_wolfe(
    symmetry: Symmetry,
    networks: Sequence[Tensors],
    elements: Sequence[Mapping[str, Any]],
    trees: Sequence[Tree],
    steps: int,
) -> list[Mapping[str, Any]]:
    """Elements next to where no small move of all matrices together gains.

    Groups with others within them stay as they are, as do those that stand twice in a tensor.
    """
    import torch

    layouts = [symmetry.tensors[n] for n in networks[0]]
    trees = [t for t in trees if not t.below and not any(is_quadratic(x, t.group) for x in layouts)]
    groups = {t.group for t in trees}
    still = [{g: m for g, m in e.items() if g not in groups} for e in elements]
    bases = [apply(symmetry, t, e) for t, e in zip(networks, still, strict=True)]
    now: list[Matrices] = [
        {t.group: torch.eye(t.size)[torch.as_tensor(e[t.group])] for t in trees} for e in elements
    ]
    # half way to the middle, from where every permutation can be reached
    for matrices in now:
        for tree in trees:
            matrices[tree.group] = 0.5 * matrices[tree.group] + 0.5 / tree.size
    degree = 2 * max(_meeting(x, groups) for x in layouts)
    points = [i / degree for i in range(degree + 1)]
    for _ in range(steps):
        ends = _vertices(symmetry, bases, now, trees)
        values = [pairs(_softly(symmetry, bases, _between(now, ends, t))) for t in points]
        best = _largest(points, values)
        if best[1] - values[0] <= _GAIN * abs(values[0]):
            break
        now = _between(now, ends, best[0])
    rounded: list[Mapping[str, Any]] = []
    for matrices, element in zip(now, still, strict=True):
        index = {g: assign(m.double().numpy().copy()).index for g, m in matrices.items()}
        rounded.append({**element, **index})
    return rounded


def _meeting(layout: Layout, groups: Collection[str]) -> int:
    """How many of the groups' places meet in one block of a tensor; at least one."""
    return max([1, *(sum(f.group in groups for f in b) for b in blocks(layout.axes))])


def _between(one: Sequence[Matrices], other: Sequence[Matrices], share: float) -> list[Matrices]:
    return [
        {g: (1 - share) * m + share * n[g] for g, m in matrices.items()}
        for matrices, n in zip(one, other, strict=True)
    ]


def _softly(
    symmetry: Symmetry, networks: Sequence[Tensors], matrices: Sequence[Matrices]
) -> list[dict[str, Tensor]]:
    return [
        {n: soft(symmetry.tensors[n], t, m) for n, t in network.items()}
        for network, m in zip(networks, matrices, strict=True)
    ]


def soft(layout: Layout, tensor: Tensor, matrices: Matrices, without: str = "") -> Tensor:
    """The tensor with its groups' coordinates mixed by matrices, on all its axes alike."""
    import torch

    if not any(g in matrices and g != without for g in layout.groups()):
        return tensor
    out = torch.empty_like(tensor)
    pairs = zip(views(tensor, layout.axes), views(out, layout.axes), strict=True)
    for (block, factors), (place, _) in pairs:
        for k, factor in enumerate(factors):
            if factor.group in matrices and factor.group != without:
                block = torch.tensordot(matrices[factor.group], block, dims=([1], [k])).movedim(
                    0, k
                )
        place.copy_(block)
    return out


def _vertices(
    symmetry: Symmetry, networks: Sequence[Tensors], now: Sequence[Matrices], trees: Sequence[Tree]
) -> list[Matrices]:
    """For each network and group the permutation that the objective's slope points to most."""
    import numpy as np
    import torch

    moved = _softly(symmetry, networks, now)
    total = {n: sum((m[n] for m in moved[1:]), moved[0][n]) for n in moved[0]}
    out: list[Matrices] = []
    for network, matrices, own in zip(networks, now, moved, strict=True):
        ends: Matrices = {}
        for tree in trees:
            scores = np.zeros((tree.size, tree.size))
            for name in network:
                layout = symmetry.tensors[name]
                if tree.group not in layout.groups():
                    continue
                rest = total[name] - own[name]
                aligned = soft(layout, network[name], matrices, without=tree.group)
                scores_of(terms_of(layout, rest, aligned, tree, matrices), tree.group, scores)
            index = assign(scores).index
            ends[tree.group] = torch.eye(tree.size)[torch.as_tensor(index)]
        out.append(ends)
    return out


def _largest(points: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Where in [0, 1] the polynomial through the points is largest, and its value there."""
    import numpy as np

    found = np.polynomial.Polynomial.fit(points, values, len(points) - 1)
    roots = [complex(r) for r in found.deriv().roots()]
    inside = [r.real for r in roots if abs(r.imag) < 1e-9 and 0.0 < r.real < 1.0]
    options = [0.0, 1.0, *inside]
    return max(((t, float(found(t))) for t in options), key=lambda o: o[1])
