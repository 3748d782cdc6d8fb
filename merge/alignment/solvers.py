"""The small problems that matching comes down to, each solved exactly, each with its value.

All maximise: ``scores[i, j]`` is what it is worth that coordinate j of the second network becomes
coordinate i of the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Assignment", "assign", "assign_signed", "phases", "potentials", "procrustes"]

TIE = 1e-12
"""Two values closer than this, relative to the sum of absolute scores, are one: the start stays."""

_WARM = 512
"""Coordinates from which on potentials for the next problem are worth their while."""

_BLOCK = 1 << 22  # scores that are looked at in one go


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Coordinate i is coordinate ``index[i]`` of the second network; ``value`` sums the scores.

    sign: -1 where a coordinate changes its sign. potentials: of the columns, to start the next and
    similar problem from; None where that is not worth it.
    """

    index: NDArray[np.int64]
    value: float
    sign: NDArray[np.float64] | None = None
    potentials: NDArray[np.float64] | None = None


def assign(
    scores: NDArray[np.float64],
    start: NDArray[np.int64] | None = None,
    columns: NDArray[np.float64] | None = None,
) -> Assignment:
    """The permutation p of largest ``sum_i scores[i, p[i]]``, exact.

    scores: (n, n) float64, used as working space and worthless afterwards. start: a permutation
    that is kept where nothing is better. columns: potentials of an earlier and similar problem.

    Where the largest score of each row is in a column of its own, that is the answer (Kuhn 1955
    would find no more); fine-tunes of one base end here. Otherwise scipy's shortest augmenting
    paths (Crouse 2016), on scores from which the potentials are subtracted: any number taken from a
    whole column changes no choice, but a good one leaves little to search.
    """
    import numpy as np

    count = len(scores)
    shift = 0.0
    if columns is not None:
        scores -= columns
        shift = float(columns.sum())
    rows = np.arange(count)
    best = scores.argmax(axis=1)
    if len(np.unique(best)) < count:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

        np.negative(scores, out=scores)  # asking scipy to maximise would cost a copy
        best = linear_sum_assignment(scores)[1]
        np.negative(scores, out=scores)
    chosen = scores[rows, best]
    value, index = float(chosen.sum()), best.astype(np.int64)
    if start is not None:
        before = float(scores[rows, start].sum())
        if before >= value - TIE * float(np.abs(chosen).sum() + abs(shift)):
            value, index = before, start
    known = None
    if count >= _WARM:
        known = potentials(scores, index)
        known = known if columns is None else known + columns
    return Assignment(index, value + shift, None, known)


def potentials(
    scores: NDArray[np.float64], index: NDArray[np.int64], rounds: int = 6
) -> NDArray[np.float64]:
    """Potentials v of the columns: nearly ``scores[i, j] - v[j] <= scores[i, p[i]] - v[p[i]]``.

    Longest paths from column to column by way of the rows, a few rounds of Bellman and Ford. They
    need not be exact: whoever uses them solves exactly again.
    """
    import numpy as np

    count = len(scores)
    chosen = scores[np.arange(count), index]
    found = np.zeros(count)
    step = max(1, _BLOCK // count)
    for _ in range(rounds):
        above = found[index] - chosen
        new = found.copy()
        for at in range(0, count, step):
            block = scores[at : at + step] + above[at : at + step, None]
            np.maximum(new, block.max(axis=0), out=new)
        if (new == found).all():
            break
        found = new
    return found


def assign_signed(
    scores: NDArray[np.float64],
    unsigned: NDArray[np.float64] | None = None,
    start: NDArray[np.int64] | None = None,
) -> Assignment:
    """The permutation and signs of largest ``sum_i sign[i] scores[i, p[i]] + unsigned[i, p[i]]``.

    unsigned: scores that no sign changes, as of the gains of a norm.
    """
    import numpy as np

    total = np.abs(scores) if unsigned is None else np.abs(scores) + unsigned
    found = assign(total, start)
    sign = np.where(scores[np.arange(len(scores)), found.index] < 0, -1.0, 1.0)
    return Assignment(found.index, found.value, sign)


def procrustes(scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The orthogonal matrix M of largest ``sum_ij M[i, j] scores[i, j]``, and that value.

    M = U V' for scores = U S V' (Schoenemann 1966); the value is the sum of S.
    """
    import numpy as np

    u, s, vh = np.linalg.svd(scores)
    return u @ vh, float(s.sum())


def phases(scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The best rotation of each plane (j, j + n/2), as a matrix, and what it is worth.

    Each pair of coordinates is a complex number; the products of both networks' pairs add up to
    c_j, the best phase is c_j / |c_j|, and the value the sum of all |c_j|.
    """
    import numpy as np

    half = len(scores) // 2
    upper, lower = np.arange(half), np.arange(half) + half
    cosine = scores[upper, upper] + scores[lower, lower]
    sine = scores[lower, upper] - scores[upper, lower]
    size = np.hypot(cosine, sine)
    alive = size > 0
    cosine = np.where(alive, cosine, 1.0) / np.where(alive, size, 1.0)
    sine = np.where(alive, sine, 0.0) / np.where(alive, size, 1.0)
    matrix = np.zeros_like(scores)
    matrix[upper, upper] = matrix[lower, lower] = cosine
    matrix[lower, upper], matrix[upper, lower] = sine, -sine
    return matrix, float(size.sum())
