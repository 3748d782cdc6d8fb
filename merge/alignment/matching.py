"""One group, and those that depend on it, matched by the blocks of tensors where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from merge.alignment.costs import Part, Term, parts_of, scores_of
from merge.alignment.families import Tree, members
from merge.alignment.nested import Solved, arrays, from_arrays, solve, solve_together, still
from merge.alignment.solvers import assign, assign_signed
from merge.symmetry.elements import Scaled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Matched", "Scores", "identity", "match", "match_nested", "match_parts", "same_move"]

DENSE = 4096
"""Coordinates of a group and what depends on it up to which all pairs are always looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """What a match found: a move for each group, what that is worth, and how much more than before.

    potentials: to start the next match of the same group from.
    """

    element: dict[str, Any]
    value: float
    gain: float = 0.0
    potentials: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What each pair of a group's coordinates is worth, (n, n) in float64.

    unsigned: the share that no change of signs alters; None where signs do not change anyway.
    """

    group: str
    plain: NDArray[np.float64]
    unsigned: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, tree: Tree, signed: bool) -> Scores:
        """Nothing so far."""
        import numpy as np

        none = [np.zeros((tree.size, tree.size)) for _ in range(1 + signed)]
        return cls(tree.group, *none)

    def add(self, terms: Sequence[Term]) -> None:
        """Add what the terms are worth."""
        for term in terms:
            apart = term.unsigned and self.unsigned is not None
            scores_of([term], self.group, self.unsigned if apart else self.plain)  # type: ignore[arg-type]

    def copy(self) -> Scores:
        """The same numbers elsewhere."""
        return Scores(
            self.group,
            self.plain.copy(),
            None if self.unsigned is None else self.unsigned.copy(),
        )

    def worth(self, move: Any) -> float:
        """What a move of the group is worth."""
        import numpy as np

        index = getattr(move, "index", move)
        rows = np.arange(len(index))
        chosen = self.plain[rows, index]
        if isinstance(move, Scaled):
            chosen = chosen * move.factor
        if self.unsigned is not None:
            chosen = chosen + self.unsigned[rows, index]
        return float(chosen.sum())


def match(scores: Scores, now: Any, columns: NDArray[np.float64] | None = None) -> Matched:
    """The best move of a group by its scores, which are overwritten; ``now`` if nothing is better.

    columns: potentials of an earlier match.
    """
    before = scores.worth(now)
    if scores.unsigned is not None:
        start = now.index if isinstance(now, Scaled) else now
        found = assign_signed(scores.plain, scores.unsigned, start)
        assert found.sign is not None
        move = Scaled(found.index, found.sign)
        return Matched({scores.group: move}, found.value, found.value - before)
    found = assign(scores.plain, now, columns)
    gain = found.value - before
    return Matched({scores.group: found.index}, found.value, gain, found.potentials)


def match_parts(
    tree: Tree, parts: Sequence[Part], now: Mapping[str, Any], *, signed: bool = False
) -> Matched:
    """The best moves of a group and of those that depend on it, by products of all pairs."""
    if tree.below:
        solved, value = solve(tree, parts, from_arrays(tree, now))
        return Matched(arrays(tree, solved), value)
    scores = Scores.of(tree, signed)
    for part in parts:
        scores.plain[:] += part.products
    return match(scores, now[tree.group])


def match_nested(tree: Tree, terms: Sequence[Term], now: Mapping[str, Any]) -> Matched:
    """The best moves of a group and of those that depend on it, by the blocks in which they stand.

    All pairs of the group's indices are looked at, and what depends on it is matched in each.
    Where that is too much, as for stacks of wide experts, pairs are scored by what a random
    matching within them would be worth, and the best is found within the chosen pairs only; it
    counts if it is worth more than what there was.
    """
    sizes = {t.group: t.size for t in members(tree)}
    start = from_arrays(tree, now)
    if max(t.size(sizes) for t in terms) <= max(DENSE, *sizes.values()):
        solved, value = solve(tree, parts_of(terms), start)
        return Matched(arrays(tree, solved), value)
    options = [start.index]
    if tree.moves:
        scores = Scores.of(tree, signed=False)
        scores.add([t.mean_over(tree.group) for t in terms])
        index = assign(scores.plain, start.index).index
        if (index != start.index).any():
            options.append(index)
    tried = [_within(tree, terms, replace(start, index=index), start) for index in options]
    solved, value = max(tried, key=lambda found: found[1])
    return Matched(arrays(tree, solved), value)


def _within(
    tree: Tree, terms: Sequence[Term], wanted: Solved, start: Solved
) -> tuple[Solved, float]:
    """What depends on a group, matched within the pairs that are given."""
    below, total = [], 0.0
    for i, j in enumerate(wanted.index):
        inner = parts_of([t.at(tree.group, i, int(j)) for t in terms])
        known = start.below[i] if start.index[i] == j else None
        found, value = solve_together(tree.below, inner, known)
        below.append(found)
        total += value
    return Solved(wanted.index, tuple(below)), total


def identity(*trees: Tree) -> dict[str, Any]:
    """The element that leaves all groups of the trees where they are."""
    return {name: move for t in trees for name, move in arrays(t, still(t)).items()}


def same_move(one: Any, other: Any) -> bool:
    """Whether two moves of a group are one and the same."""
    import numpy as np

    if isinstance(one, Scaled) != isinstance(other, Scaled):
        moved = one if isinstance(one, Scaled) else other
        still = other if moved is one else one
        return bool((moved.index == still).all() and (moved.factor == 1).all())
    if isinstance(one, Scaled):
        return np.array_equal(one.index, other.index) and np.array_equal(one.factor, other.factor)
    return np.array_equal(one, other)
