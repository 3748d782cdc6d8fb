"""Units of several networks gathered into clusters by how alike they answer (ZipIt!).

Greedily the two most alike are joined, whether they are of one network or of two, until as few are
left as wanted; a cluster is as like another as the least alike of the two it was made of, times a
factor (Stoica et al. 2023, arXiv:2305.03053, algorithm 1). Here the largest entry of each row is
kept in a heap, so that n joins take O(n^2 log n) and not O(n^3).
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from merge.errors import PlanError, RecipeError
from merge.partial.joined import Membership

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["clustered"]


def clustered(
    alike: NDArray[np.float64],
    models: int,
    count: int,
    *,
    factor: float = 0.3,
    inside: float = 1.0,
) -> Membership:
    """``count`` clusters of the units of ``models`` networks.

    alike: (models * n, models * n), symmetric; the networks' units one after the other. factor:
    what a cluster's likeness to others is multiplied by at each join, above 0 and at most 1.
    inside: joins of clusters that both have units of one network, for each network at most that
    share of its part in all joins (their number over ``models``), rounded down. New units are in
    the order of their first members. PlanError for likenesses that are no numbers, and where no two
    are left that may be joined.
    """
    import numpy as np

    total = len(alike)
    size = total // models
    _check(alike, count, factor, inside)
    scores = np.array(alike, np.float64)
    np.fill_diagonal(scores, -np.inf)
    to_join = total - count
    left = [int(to_join / models * inside)] * models
    holds = np.repeat(np.eye(models, dtype=bool), size, axis=1)  # (models, clusters)
    parent = np.arange(total)
    alive = np.ones(total, bool)
    for model in range(models):
        if not left[model]:
            scores[np.ix_(holds[model], holds[model])] = -np.inf
    best = scores.argmax(1)
    value = scores[np.arange(total), best]
    heap = [(-float(value[i]), i) for i in range(total)]
    heapq.heapify(heap)

    def update(i: int) -> None:
        best[i] = scores[i].argmax()
        value[i] = scores[i, best[i]]
        heapq.heappush(heap, (-float(value[i]), i))

    while to_join and heap:
        negative, i = heapq.heappop(heap)
        if not alive[i] or value[i] != -negative:
            continue  # a newer entry of the row is in the heap
        j = int(best[i])
        if scores[i, j] != value[i]:  # what it was like has been joined to another since
            update(i)
            continue
        if value[i] == -np.inf:
            break
        first, second = min(i, j), max(i, j)
        row = np.minimum(scores[first], scores[second]) * factor
        row[[first, second]] = -np.inf
        scores[first], scores[:, first] = row, row
        scores[second], scores[:, second] = -np.inf, -np.inf
        alive[second], parent[second] = False, first
        to_join -= 1
        within = np.flatnonzero(holds[:, first] & holds[:, second])
        holds[:, first] |= holds[:, second]
        for model in within.tolist():
            left[model] -= 1
            if not left[model]:
                own = alive & holds[model]
                scores[np.ix_(own, own)] = -np.inf
        update(first)
        for k in np.flatnonzero(alive & (scores[first] > value)).tolist():
            best[k], value[k] = first, scores[first, k]
            heapq.heappush(heap, (-float(value[k]), k))
    if to_join:
        raise PlanError(
            "the units cannot be joined to that few",
            found=f"{count + to_join} clusters, and no two that may be joined",
            expected=f"{count} clusters",
            do="allow more joins within a network, or keep more units",
        )
    return _membership(parent, models)


def _membership(parent: NDArray[np.int64], models: int) -> Membership:
    """Clusters in the order of their first members. parent: always earlier, or itself."""
    import numpy as np

    top = parent.copy()
    for i in range(len(top)):
        top[i] = top[top[i]]
    firsts, index = np.unique(top, return_inverse=True)
    return Membership(index.reshape(models, -1).astype(np.int64), len(firsts))


def _check(alike: NDArray[np.float64], count: int, factor: float, inside: float) -> None:
    import numpy as np

    if not np.isfinite(alike).all():
        raise PlanError(
            "units have likenesses that are no finite numbers",
            do="look for NaN or infinity in the models or the data",
        )
    if not 1 <= count <= len(alike):
        raise RecipeError(
            "there cannot be that many clusters", found=count, expected=f"1 to {len(alike)}"
        )
    if not 0 < factor <= 1:
        raise RecipeError(
            "a cluster's likeness is multiplied by a factor",
            key="factor",
            found=factor,
            expected="above 0 and at most 1, such as 0.3",
        )
    if not 0 <= inside <= 1:
        raise RecipeError(
            "the share of joins within a network is no share",
            key="inside",
            found=inside,
            expected="0 to 1, such as 0.125",
        )
