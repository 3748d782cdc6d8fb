"""Which row of which model each row of the result is: one table of rows for each model.

A model keeps its own row of every token that it has. For one that it lacks it gets the default: the
row of the only model that has the token, else the base's, else the mean of those that have it, else
zeros; or the row that the recipe chooses, which goes before own rows too where it is forced.
Rows without a token (padding) are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

from merge.ir.rows import RowTable
from merge.vocabulary.combine import Combined, Member

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Choice", "Origins", "origins"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the recipe takes a token's row from: (member, row), or None for zeros."""

    row: tuple[int, int] | None
    force: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Origins:
    """Of each row of the result: the members' own rows, and the default for those without.

    own: members x rows, the row of each member, -1 where it has none. default: members x rows,
    whether the default row is made of that member's; ``row`` says which of its rows. forced: rows
    at which the default goes before own rows. token: rows that are a token's.
    """

    own: NDArray[np.int64]
    default: NDArray[np.bool_]
    row: NDArray[np.int64]
    forced: NDArray[np.bool_]
    token: NDArray[np.bool_]

    def table(self, member: int, *, multiple: int = 1) -> RowTable:
        """The rows of one member's matrix in the result, their number rounded up to ``multiple``.

        Rows that are added for the rounding are the mean of the member's own tokens.
        """
        import numpy as np

        mine = self.own[member]
        kept = (mine >= 0) & ~self.forced
        used, row = self.default.copy(), self.row.copy()
        used[:, kept] = False
        used[member, kept] = True
        row[member, kept] = mine[kept]
        output, operand = np.nonzero(used.T)
        entries = row[operand, output]
        bounds = np.concatenate([[0], np.cumsum(used.sum(0))])
        begin, end = bounds[:-1], bounds[1:]
        if fill := -len(begin) % multiple:
            tokens = mine[self.token & (mine >= 0)]
            begin = np.concatenate([begin, np.full(fill, len(entries))])
            end = np.concatenate([end, np.full(fill, len(entries) + len(tokens))])
            operand = np.concatenate([operand, np.full(len(tokens), member)])
            entries = np.concatenate([entries, tokens])
        return RowTable.from_spans(begin, end, operand, entries)

    def own_table(self, member: int, *, multiple: int = 1) -> RowTable:
        """The same for what has no defaults, such as a statistic of weights: zeros stand there."""
        import numpy as np

        mine = self.own[member]
        padded = np.concatenate([mine, np.full(-len(mine) % multiple, -1)])
        return RowTable.single(0, padded)

    def counts(self, labels: Sequence[str]) -> dict[str, int]:
        """How many rows there are of each class, in words. labels: the members' names."""
        has = (self.own >= 0) & self.token
        models = has.sum(0)
        found = {"shared": int((models > 1).sum())}
        for i, label in enumerate(labels):
            found[f"only in {label}"] = int((has[i] & (models == 1)).sum())
        found["in no model"] = int((self.token & (models == 0)).sum())
        averaged = (self.default.sum(0) > 1) & self.token
        found["averaged for models that lack them"] = int(averaged.sum())
        found["padding"] = int((~self.token).sum())
        return {name: count for name, count in found.items() if count}


def origins(
    members: Sequence[Member], combined: Combined, base: int, choices: Mapping[str, Choice]
) -> Origins:
    """Where each row of the result comes from. base: the member whose rows are the first default.

    choices: what the recipe says of some tokens, all of which are tokens of the result.
    """
    import numpy as np

    shape = (len(members), combined.rows)
    own = np.full(shape, -1, np.int64)
    where = np.fromiter(combined.ids.values(), np.int64, len(combined.ids))
    inside = where < combined.rows
    token = np.zeros(combined.rows, np.bool_)
    token[where[inside]] = True
    for mine, member in zip(own, members, strict=True):
        if not member.present:
            continue
        ids = member.vocabulary.ids
        old = np.fromiter(map(ids.get, combined.ids, repeat(-1)), np.int64, len(combined.ids))
        there = inside & (old >= 0) & (old < member.rows)
        mine[where[there]] = old[there]
        _pad(mine, member, token)
    has = own >= 0
    default, row = has.copy(), np.maximum(own, 0)
    default[:, has[base]] = False
    default[base, has[base]] = True
    at = ~token
    default[:, at] = False
    default[combined.ground, at] = has[combined.ground, at]
    forced = np.zeros(combined.rows, np.bool_)
    for content, choice in choices.items():
        place = combined.ids[content]
        default[:, place] = False
        forced[place] = choice.force
        if choice.row is not None:
            member_number, chosen = choice.row
            default[member_number, place] = True
            row[member_number, place] = chosen
    return Origins(own, default, row, forced, token)


def _pad(mine: NDArray[np.int64], member: Member, token: NDArray[np.bool_]) -> None:
    """Rows without a token stay what they are where the member has none there either."""
    import numpy as np

    length = min(len(mine), member.rows)
    free = ~token[:length]
    ids = member.vocabulary.ids
    taken = np.fromiter(ids.values(), np.int64, len(ids))
    free[taken[taken < length]] = False
    mine[:length][free] = np.flatnonzero(free)
