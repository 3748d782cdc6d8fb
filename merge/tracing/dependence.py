"""Which atoms may be moved in another way for each index of others.

Query slots may be exchanged in one way within the first key/value head and in another within the
second, since every tensor that has slots has the heads beside them. The rule: a may depend on b
where b stands exactly once beside a in every labelled tensor, parameters and intermediate results
alike. Once, since a map from heads to heads has two indices of them, and a could go by one only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merge.tracing.atoms import Atom, Ref
from merge.tracing.labels import Label, blocks

__all__ = ["parents_of"]


def parents_of(labels: Iterable[Label], parameters: Sequence[Ref]) -> dict[Atom, list[Atom]]:
    """For each atom that is not frozen the atoms that it may depend on, the outer ones first.

    ``parameters`` are the occurrences in parameters, in order: of two atoms that always stand
    together the first is the outer one. Only atoms of parameters count.
    """
    order = {root: n for n, root in enumerate(dict.fromkeys(r.root for r in parameters))}
    beside: dict[Atom, set[Atom]] = {}
    seen: dict[Atom, int] = dict.fromkeys(order, 0)
    for label in labels:
        for block in blocks(label):
            here = [root for root in block if root in order]
            once = {root for root in here if block[root] == 1}
            for root in here:
                seen[root] += 1
                found = beside.get(root)
                beside[root] = once - {root} if found is None else found & once
    rank = {root: (-seen[root], order[root]) for root in order}
    return {
        root: sorted((p for p in others if rank[p] < rank[root]), key=lambda p: rank[p])
        for root, others in beside.items()
        if not root.frozen
    }
