"""Networks of different tasks zipped into one: units joined within and across them (ZipIt!)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.aligning import How, match_checkpoints
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError
from merge.families.reconcile import reconcile
from merge.ir.align import short
from merge.ir.checkpoint import Checkpoint
from merge.joining import check_shapes, joined_checkpoint, symmetry_on, task_of
from merge.partial.clusters import clustered
from merge.partial.groups import separable
from merge.partial.joined import Membership, couplings_of
from merge.symmetry.symmetry import Symmetry
from merge.transport.mapped import roles_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from merge.parting_data import Networks

__all__ = ["Zipped", "zip_models"]


@dataclass(frozen=True, slots=True, eq=False)
class Zipped:
    """Networks that were zipped.

    checkpoint: one network, where all of it was zipped; up to ``until`` it is that network's front,
    and `network` has the rest of each. members: of each group which new unit each network's unit
    became. within: of each group the share of new units that are of one network alone.
    """

    checkpoint: Checkpoint
    members: Mapping[str, Membership]
    until: str | None
    networks: Networks = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """The groups' new sizes."""
        return {g: m.count for g, m in self.members.items()}

    def within(self) -> dict[str, float]:
        """Of each group the share of new units whose members are all of one network."""
        found = {}
        for group, membership in self.members.items():
            rows = [set(row.tolist()) for row in membership.index]
            shared = sum(sum(unit in row for row in rows) > 1 for unit in range(membership.count))
            found[group] = 1.0 - shared / membership.count
        return found

    def network(self, outputs: str = "each") -> nn.Module:
        """A module that runs: all of it zipped, or a zipped front with the rest of each network.

        outputs: with ``until``, what it returns: ``each`` rest's output in a tuple, their ``mean``,
        or ``cat``, the classes of all one after the other.
        """
        from merge.zipping_data import network_of

        return network_of(self.networks, self.checkpoint, self.members, self.until, outputs)

    def save(self, out: str | Path, **how: Any) -> Path:
        """Save the checkpoint, as `Checkpoint.save` does; PlanError where it is only a front."""
        if self.until is not None:
            raise PlanError(
                "a network that is zipped in part has several heads, which no model's folder holds",
                until=self.until,
                do="save network().state_dict() with torch, or zip all of it",
            )
        return self.checkpoint.save(out, **how)

    def to_json(self) -> dict[str, Any]:
        """Plain data: all but the tensors."""
        return {
            "until": self.until, "sizes": self.sizes, "within": self.within(),
            "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        end = "" if self.until is None else f" up to {self.until}"
        lines = [f"zipped{end}: {len(self.members)} groups"]
        within = self.within()
        for group, membership in self.members.items():
            old = membership.index.size
            lines.append(
                f"  {group:12} {old:6} units to {membership.count},"
                f" {within[group]:.1%} of one network alone"
            )
        return "\n".join(lines + [f"  note: {n}" for n in self.notes])


def zip_models(
    models: Sequence[object],
    data: object,
    *,
    ratio: float | None = None,
    factor: float = 0.3,
    inside: float = 1.0,
    until: str | None = None,
    samples: int = 2048,
    symmetry: object = None,
    keep: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Zipped:
    """The networks in one: units that answer alike are joined, within and across them.

    ZipIt! (Stoica et al. 2023, arXiv:2305.03053), for networks of one architecture that were
    trained on different tasks: what they have in common is joined, and units that one network has
    twice make room for what only another has. What is joined is written by the mean of its members,
    and their readers read it in their places.

    models: anything `merge.open` takes, two or more. data: a `Task`, what names one, or, where the
    first model is a module, batches of its inputs; of all tasks together at best. ratio: the share
    of all networks' units that is joined away: by default what gives one network's width (0.5 for
    two). factor: what the likeness of joined units to others is multiplied by, above 0 and at most
    1. inside: how many joins may be within one network, as a share of its part, 0 to 1; the
    authors' code takes 0.125. until: the name of a module, such as ``layers.3``, up to which
    networks are zipped: behind it each keeps its own rest, and there is an output for each.
    samples: examples at most. Statistics of BatchNorm are measured anew. symmetry: as for
    `merge.pleas`. keep: groups that stay as they are.

    What a fully zipped network returns is the mean of what the networks return. Groups behind a
    LayerNorm or RMSNorm, and heads, are aligned and averaged. RecipeError for options that are
    none, PlanError for models that differ.

    Example::

        zipped = merge.zip_models([cats, dogs], batches, until="layer3")
        cat_scores, dog_scores = zipped.network()(x)
    """
    from merge.parting_data import Networks
    from merge.zipping_data import likenesses, measured

    if len(models) < 2:
        raise RecipeError("there is nothing to zip", key="models", expected="two models or more")
    share = 1.0 - 1.0 / len(models) if ratio is None else ratio
    if not 0 <= share < 1:
        raise RecipeError(
            "the ratio is the share of all units that is joined away",
            key="ratio",
            found=ratio,
            expected="0 or more and less than 1, such as 0.5 for two networks",
        )
    if data is None:
        raise RecipeError("this needs data, and none was given", key="data", do="give data")
    opened = [open_checkpoint(m) for m in models]
    first = reconcile([opened[-1], opened[0]])[1]
    networks = [first, *opened[1:]]
    for other in networks[1:]:
        check_shapes(first, other)
    task = task_of(data, models[0], first)
    own = symmetry_on(first, symmetry, task)
    able, reasons = separable(own, roles_of(own))
    notes = [f"{', '.join(names)}: {why}, so averaged" for why, names in reasons.items()]
    if reasons:
        how = How("activation", own, task, tuple({*able, *keep}))
        networks = [first, *(match_checkpoints(first, o, how).move(o) for o in networks[1:])]
    known = Networks.of(task, networks, own, samples)
    groups = [g for g in able if g not in keep]
    if progress is not None:
        progress("units are compared")
    alike = likenesses(known, groups, until)
    members = _members(own, groups, alike, len(models), share, factor, inside, notes, progress)
    merged = joined_checkpoint(networks, own, members, couplings_of(members, len(models)))
    merged, told = measured(known, merged, couplings_of(members, len(models)))
    notes += told
    label = f"zipped({', '.join(short(c.label) for c in opened)})"
    checkpoint = replace(merged, label=label, notes=(*first.notes, *notes))
    return Zipped(checkpoint, members, until, known, tuple(notes))


def _members(
    own: Symmetry,
    groups: Sequence[str],
    alike: Mapping[str, NDArray[Any]],
    models: int,
    share: float,
    factor: float,
    inside: float,
    notes: list[str],
    progress: Callable[[str], None] | None,
) -> dict[str, Membership]:
    """The clusters of each group whose units were seen."""
    found: dict[str, Membership] = {}
    unseen = [g for g in groups if g not in alike]
    if unseen:
        notes.append(f"{', '.join(unseen)}: not seen before the cut, so not zipped")
    for group in groups:
        if group not in alike:
            continue
        if progress is not None:
            progress(f"{group} is zipped")
        total = models * own.groups[group].size
        count = max(1, round((1.0 - share) * total))
        try:
            found[group] = clustered(alike[group], models, count, factor=factor, inside=inside)
        except PlanError as error:
            raise error.at(group=group) from None
    if not found:
        raise PlanError(
            "no layer shows a group whose units could be zipped",
            found=f"{len(groups)} groups",
            do="zip further, or write the network with torch.nn's layers",
        )
    return found
