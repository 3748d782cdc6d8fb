"""Block ascent on the inner product of two networks: sweeps over their tensors, group by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.alignment.costs import Term, piled, terms_of
from merge.alignment.families import Tree, names_of
from merge.alignment.held import Held, Pair, product
from merge.alignment.matching import Matched, Scores, match, match_nested, same_move
from merge.alignment.passes import Batch, Passes, is_quadratic
from merge.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Ascent"]

_TURNS = 20
"""Turns over the groups of one batch in a sweep; usually two."""


@dataclass(slots=True)
class Ascent:
    """The state of an ascent: ``element`` is the best there is, ``objective`` how it got there."""

    symmetry: Symmetry
    passes: Passes
    held: Held
    element: dict[str, Any]
    signed: bool = False
    objective: list[float] = field(default_factory=list)  # after each sweep
    before: float = 0.0  # the objective of the networks as they are
    converged: bool = False
    norms: dict[str, list[float]] = field(default_factory=dict)  # of tensors, squared: A's and B's
    _worth: dict[str, float] = field(default_factory=dict)  # of tensors, in this sweep
    _gains: dict[str, float] = field(default_factory=dict)  # of spread groups, after that
    _scores: dict[str, Scores] = field(default_factory=dict)
    _columns: dict[str, NDArray[Any] | None] = field(default_factory=dict)

    def run(self, sweeps: int, *, anchored: bool) -> None:
        """Sweep until all is at rest, or so many times."""
        for number in range(sweeps):
            if not self.sweep(anchored=anchored and number == 0):
                self.converged = True
                return

    def sweep(self, *, anchored: bool) -> bool:
        """One pass over all tensors; whether another one may find more."""
        self._worth.clear()
        self._gains = {t.group: 0.0 for t in self.passes.spread}
        self._scores = {t.group: self._nothing(t) for t in self.passes.spread}
        restless = False
        for batch in self.passes.batches:
            if not batch.trees:
                self._add(batch)
        if anchored and self._worth:
            for tree in self.passes.spread:
                found = match(self._scores[tree.group].copy(), self.element[tree.group])
                self._take(tree, found)
                self._gains[tree.group] = found.gain
        for batch in self.passes.batches:
            if batch.trees:
                self.held.load(batch.names)
                restless |= self._match_batch(batch, anchored)
                self._add(batch)
        for tree in self.passes.spread:
            restless |= self._match_spread(tree)
        for name in dict.fromkeys(n for names in self.passes.again.values() for n in names):
            self.held.load([name])
            self._worth[name] = self.held.pair(name).worth(self.element)
        self.objective.append(math.fsum([*self._worth.values(), *self._gains.values()]))
        return restless

    def cosine(self, group: str) -> float | None:
        """Cosine of the two networks over the tensors of a group, as matched in the last sweep."""
        names = [n for n in self.norms if group in self.symmetry.tensors[n].groups()]
        scale = self.scale(names)
        found = math.fsum(self._worth[n] for n in names) + self._gains.get(group, 0.0)
        return found / scale if scale else None

    def scale(self, names: Sequence[str]) -> float:
        """Product of the norms of both networks over some tensors."""
        return math.sqrt(math.prod(math.fsum(self.norms[n][k] for n in names) for k in (0, 1)))

    # -- groups of one batch -----------------------------------------------------------------------
    def _match_batch(self, batch: Batch, anchored: bool) -> bool:
        """Match the groups of a batch in turns; whether the last turn still moved one."""
        alone = len(batch.trees) == 1 and not self._squares(batch.trees[0], batch.names)
        if anchored:
            for tree, names in self._anchored(batch):
                self._take(tree, self._best(tree, names))
        elif alone:
            self._take(batch.trees[0], self._best(batch.trees[0], batch.names))
        if alone:
            return False  # matched exactly, all else given
        moved = True
        for _ in range(_TURNS if self.passes.spread else 1):
            moved = False
            for tree in batch.trees:
                moved |= self._take(tree, self._best(tree, self._places(tree, batch.names)))
            if not moved:
                break
        return moved

    def _anchored(self, batch: Batch) -> list[tuple[Tree, list[str]]]:
        """The batch's groups in an order in which each meets much of what is matched by then, each
        with the tensors in which all else is."""
        done = {t.group for t in self.passes.spread}
        rest, order = list(batch.trees), []
        while rest:
            known: list[tuple[float, Tree, list[str]]] = []
            for tree in rest:
                names = self._places(tree, batch.names)
                sure = [n for n in names if {*self.passes.roots[n]} <= done | {tree.group}]
                share = self.held.elements(sure) / max(1, self.held.elements(names))
                known.append((share, tree, sure if share else names))
            _, tree, names = max(known, key=lambda found: found[0])
            order.append((tree, names))
            rest.remove(tree)
            done.add(tree.group)
        return order

    def _places(self, tree: Tree, names: Sequence[str]) -> list[str]:
        return [n for n in names if tree.group in self.passes.roots[n]]

    def _squares(self, tree: Tree, names: Sequence[str]) -> list[str]:
        """Tensors in which the group stands twice, such as maps of a stream to itself."""
        tensors = self.symmetry.tensors
        return [n for n in names if not tree.below and is_quadratic(tensors[n], tree.group)]

    def _best(self, tree: Tree, names: Sequence[str], scores: Scores | None = None) -> Matched:
        """The best move of a group by tensors that are held; scores: of others, overwritten."""
        if tree.below:
            return match_nested(tree, self._terms(tree, names), self.element)
        scores = self._nothing(tree) if scores is None else scores
        squares = self._squares(tree, names)
        scores.add(self._terms(tree, [n for n in names if n not in squares]))
        now = self.element[tree.group]
        if not squares:
            return match(scores, now, self._columns.get(tree.group))
        # not linear: take the derivative, and only what is worth more in truth
        slope = scores.copy()
        slope.add(self._terms(tree, squares))
        pairs = [self.held.pair(n) for n in squares]

        def worth(move: Any) -> float:
            whole = {**self.element, tree.group: move}
            return scores.worth(move) + math.fsum(p.worth(whole) for p in pairs)

        moves = [now, *(match(s, now).element[tree.group] for s in (slope, scores.copy()))]
        values = [worth(m) for m in moves]
        best = max(range(len(moves)), key=values.__getitem__)
        return Matched({tree.group: moves[best]}, values[best], values[best] - values[0])

    def _terms(self, tree: Tree, names: Sequence[str]) -> list[Term]:
        """The blocks of held tensors in which the tree stands, B aligned in all else."""
        element = self._without(tree)
        found: list[Term] = []
        done: set[str] = set()
        for name in names:
            if name in done:
                continue
            layout = self.symmetry.tensors[name]
            together = layout.siblings if layout.stack == tree.group else (name,)
            done.update(together)
            blocks = [self._blocks(self.held.pair(n), tree, element) for n in together]
            if layout.stack == tree.group:
                found += [piled(tree.group, terms) for terms in zip(*blocks, strict=True)]
            else:
                found += blocks[0]
        return found

    def _blocks(self, pair: Pair, tree: Tree, element: Mapping[str, Any]) -> list[Term]:
        return list(terms_of(pair.layout, pair.a, pair.aligned(element), tree, self.element))

    def _without(self, tree: Tree) -> dict[str, Any]:
        mine = names_of(tree)
        return {g: m for g, m in self.element.items() if g not in mine}

    def _take(self, tree: Tree, found: Matched) -> bool:
        """Let a group move; whether anything changes."""
        changed = any(not same_move(self.element[g], m) for g, m in found.element.items())
        self.element.update(found.element)
        self._columns[tree.group] = found.potentials
        return changed

    # -- groups all over the network ---------------------------------------------------------------
    def _nothing(self, tree: Tree) -> Scores:
        return Scores.of(tree, self.signed and "S" in self.symmetry.groups[tree.group].flags)

    def _add(self, batch: Batch) -> None:
        """Add what the batch's tensors are worth, and what they are worth to each spread group."""
        first = not self.objective
        for name in batch.names:
            here = [
                t
                for t in self.passes.spread
                if t.group in self.passes.roots[name] and name not in self.passes.again[t.group]
            ]
            worth, norms = 0.0, [0.0, 0.0]
            for pair in self.held.pieces(name):
                worth += pair.worth(self.element)
                if first:
                    raw = pair.aligned({})
                    self.before += product(pair.a, raw)
                    norms = [norms[0] + product(pair.a, pair.a), norms[1] + product(raw, raw)]
                for tree in here:
                    self._scores[tree.group].add(self._blocks(pair, tree, self._without(tree)))
            self._worth[name] = worth
            if first:
                self.norms[name] = norms

    def _match_spread(self, tree: Tree) -> bool:
        """Match a spread group by this sweep's scores; whether it moved."""
        again = self.passes.again[tree.group]
        self.held.load(again)
        known = self._scores.pop(tree.group)
        given = known.copy() if again else known
        before = known.worth(self.element[tree.group])
        found = self._best(tree, again, given)
        after = known.worth(found.element[tree.group]) if again else found.value
        self._gains[tree.group] += after - before
        return self._take(tree, found)
