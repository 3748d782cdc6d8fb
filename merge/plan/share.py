"""A plan dealt to several machines: each computes whole weight files of it, and no file twice.

Which files a rank gets depends on the plan and on the number of ranks alone, so ranks need not
talk to one another. The largest file goes first, always to the rank that has the fewest bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from merge.errors import PlanError
from merge.plan.model import OutputFile, Plan, SideOutput

__all__ = ["LEDGER", "Rank", "deal", "deal_plan"]

LEDGER = "merge_share.json"
"""The file in a rank's folder that says what the whole plan is made of, and who computes what."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One of ``world`` machines that share a plan. ``told_by``: what said so."""

    rank: int
    world: int
    told_by: str = ""

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise PlanError(
                "there is no such rank",
                found=f"rank {self.rank} of {self.world}",
                expected="a world of 1 or more, and a rank from 0 to world - 1",
                told_by=self.told_by or None,
            )

    def __str__(self) -> str:
        return f"{self.rank}-of-{self.world}"


def deal(files: Sequence[OutputFile], world: int) -> tuple[tuple[OutputFile, ...], ...]:
    """The files of each rank, in the order of the plan.

    Longest processing time first (Graham 1969): no rank gets more than 4/3 of the least possible.
    """
    loads = [0] * world
    owner: dict[str, int] = {}
    for file in sorted(files, key=lambda f: (-f.size, f.name)):
        least = min(range(world), key=lambda r: (loads[r], r))
        loads[least] += file.size
        owner[file.name] = least
    return tuple(tuple(f for f in files if owner[f.name] == r) for r in range(world))


def deal_plan(plan: Plan, rank: Rank) -> Plan:
    """What ``rank`` computes of ``plan``: a plan too, with a ledger among its side files.

    The first rank writes the side files of the whole. PlanError for a plan that another machine
    cannot make the same: it reads weights that are in this process's memory only.
    """
    held = next((r.spec.name for s in plan.steps for r in s.reads if not r.source.files), None)
    if held is not None:
        raise PlanError(
            "the plan cannot be shared out: it reads weights that only this process has",
            tensor=held,
            found="weights in memory, such as those of a repaired model or of an adapter made anew",
            do="run it on one machine, or save that model first and name its folder in the recipe",
        )
    parts = deal(plan.files, rank.world)
    mine = {f.name for f in parts[rank.rank]}
    ledger = {
        "plan": plan.hash,
        "rank": rank.rank,
        "world": rank.world,
        "files": {f.name: f.size for f in plan.files},
        "ranks": {f.name: r for r, part in enumerate(parts) for f in part},
        "side": [s.name for s in plan.side],
    }
    text = json.dumps(ledger, indent=1) + "\n"
    return replace(
        plan,
        label=f"{plan.label}, rank {rank.rank} of {rank.world}",
        steps=tuple(s for s in plan.steps if s.file in mine),
        files=parts[rank.rank],
        side=(*(plan.side if rank.rank == 0 else ()), SideOutput(LEDGER, text=text)),
        hash=hashlib.sha256(f"{plan.hash} {rank}\n{text}".encode()).hexdigest(),
    )
