"""What recipes compute before they are merged: alignments, repairs, learned coefficients."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from merge.aligning import Found, How, match_checkpoints
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import reads

if TYPE_CHECKING:
    from merge.learned import Learning
    from merge.learning.coefficients import Coefficients
    from merge.recipe.learn_words import LearnEntry
    from merge.recipe.learned import Found as Learnt
    from merge.recipe.schema import AlignEntry, RepairEntry

__all__ = ["RecipeSteps"]

_found: deque[tuple[Checkpoint, Checkpoint, How, Found]] = deque(maxlen=8)
"""The last matches of recipes: a sweep compiles its recipe anew for every value."""


class RecipeSteps:
    """Computes the alignments and repairs of recipes, and learns their coefficients."""

    def __init__(self, learning: Learning | None = None) -> None:
        self._learning = learning

    def learn(
        self,
        experts: Mapping[str, Checkpoint],
        base: Checkpoint,
        how: LearnEntry,
        start: Coefficients,
        seed: int,
    ) -> Learnt:
        """The merge with learned coefficients, and what was found."""
        from merge.learned import Learning

        return (self._learning or Learning())(experts, base, how, start, seed)

    def align(
        self, model: Checkpoint, to: Checkpoint, how: AlignEntry
    ) -> tuple[Callable[[Checkpoint], Checkpoint], str]:
        """What brings ``model`` into the coordinates of ``to``, and what was found."""
        wanted = How(
            how.method, how.symmetry, how.data, tuple(how.keep), how.signed, tuple(how.rotate),
            tuple(sorted(how.transport().items())),
        )  # fmt: skip
        known = (f for f in _found if f[2] == wanted and f[0].same_as(model) and f[1].same_as(to))
        found = next((f[3] for f in known), None) or match_checkpoints(to, model, wanted)
        if all(r.source.files for c in (model, to) for e in c.tensors.values() for r in reads(e)):
            _found.append((model, to, wanted, found))  # weights in memory may change unseen
        report = found.match.report
        told = f"{report.method}, {report.moved:.1%} of the coordinates moved"
        if report.before is not None and report.after is not None:
            told += f", cosine of the weights {report.before:.4f} -> {report.after:.4f}"

        def move(checkpoint: Checkpoint) -> Checkpoint:
            return replace(found.move(checkpoint), label=checkpoint.label)

        return move, told

    def repair(
        self, merged: Checkpoint, parents: Sequence[Checkpoint], how: RepairEntry
    ) -> tuple[Checkpoint, str]:
        """The merged checkpoint with its parents' statistics, and what was done."""
        from merge.tasks import repaired

        return repaired(merged, parents, how.data, how.weights)
