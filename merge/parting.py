"""Two networks merged in part: what is alike becomes one, the rest stays, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from merge.aligning import How, match_checkpoints
from merge.alignment.report import Report
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError, check_word
from merge.families.reconcile import reconcile
from merge.ir.align import short
from merge.ir.checkpoint import Checkpoint
from merge.joining import check_shapes, joined_checkpoint, symmetry_on, task_of
from merge.partial.budget import Place, chosen, cost, places_of
from merge.partial.groups import separable
from merge.partial.joined import Membership, couplings_of, parted
from merge.partial.likeness import alike_by_weights
from merge.stream import TensorsOf
from merge.symmetry.symmetry import Symmetry
from merge.transport.mapped import roles_of
from merge.widths import keys_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

__all__ = ["BY", "COSTS", "PartialMerge", "pleas"]

BY = ("weights", "activations")
"""What units are matched by."""

COSTS = ("parameters", "operations")
"""What a budget counts: numbers that need not be zero, or multiplications of linear maps."""

_LEAST = 1e-3  # what it is worth that units stay apart which are quite alike


@dataclass(frozen=True, slots=True, eq=False)
class PartialMerge:
    """Two networks merged in part, and what was decided.

    checkpoint: lazy where nothing was fitted. apart: of each group how many units of each network
    stay its own. members: which new unit each unit became, those of the second network after the
    match. cost: what the budget counts, in units of one network. stored: numbers in the checkpoint,
    zeros as well, likewise. report: of the alignment. errors: of each layer that was fitted what
    remains of its targets, before and after, as shares of their energy.
    """

    checkpoint: Checkpoint
    apart: Mapping[str, int]
    members: Mapping[str, Membership]
    cost: float
    stored: float
    report: Report
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """The groups' new sizes."""
        return {g: m.count for g, m in self.members.items()}

    def module(self, module: nn.Module) -> nn.Module:
        """A copy of ``module``, which is one of the networks', with the merged tensors."""
        from merge.partial.modules import resized_module

        return resized_module(module, self.checkpoint.state_dict())

    def save(self, out: str | Path, **how: Any) -> Path:
        """Save the checkpoint, as `Checkpoint.save` does."""
        return self.checkpoint.save(out, **how)

    def to_json(self) -> dict[str, Any]:
        """Plain data: all but the tensors."""
        return {
            "cost": self.cost, "stored": self.stored, "apart": dict(self.apart),
            "sizes": dict(self.sizes), "notes": list(self.notes),
            "errors": {n: list(e) for n, e in self.errors.items()},
            "alignment": self.report.to_json(),
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"merged in part: {self.cost:.3f} times one network ({self.stored:.3f} stored)"]
        for group, size in self.sizes.items():
            lines.append(f"  {group:12} {size:6} units, {self.apart[group]} of each network apart")
        for name, (before, after) in self.errors.items():
            lines.append(f"  {name}: error {before:.3g} -> {after:.3g}")
        return "\n".join(lines + [f"  note: {n}" for n in self.notes])


def pleas(
    a: object,
    b: object,
    budget: float = 1.0,
    *,
    by: Literal["weights", "activations"] = "weights",
    count: Literal["parameters", "operations"] = "parameters",
    data: object = None,
    ratios: float | Mapping[str, float] | None = None,
    least_squares: bool | None = None,
    sequential: bool = True,
    samples: int = 2048,
    ridge: float = 1e-4,
    symmetry: object = None,
    keep: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> PartialMerge:
    """``a`` and ``b`` in one network: their most alike units merged, the others side by side.

    Partial matching with least squares (PLeaS; Nasery et al. 2024, arXiv:2407.02447). Units are
    matched; of each group the least alike pairs stay apart, as many as the budget allows, chosen
    over all groups at once; then each linear map is fitted in closed form to what the parents' maps
    gave. A group with n units of which k pairs stay apart has n + k units in the result. With all
    apart it returns the mean of what both networks return.

    a, b: anything `merge.open` takes, of one architecture and width. budget: how much larger than
    one network the result may be, 1 to 2. count: what that means: ``parameters`` that need not be
    zero, or ``operations`` (multiplications of linear maps on ``data``). by: ``weights``, or
    ``activations`` on data. ratios: instead of a budget, the share of units that stay apart, 0 to
    1: one for all groups, or by group.

    data: a `Task`, what names one as for ``merge barrier --data``, or, where ``a`` is a module, a
    list of batches of its inputs. Only inputs are used: other data than the networks were trained
    on will do where that is all there is. least_squares: by default where there is data.
    sequential: each map is fitted to the inputs that the merged network itself gives it, layer by
    layer, which takes a pass over the data for each; else to the parents' inputs, all in one pass.
    samples: examples at most. ridge: relative, towards the plain merge. Statistics of BatchNorm are
    measured anew on the data. symmetry: a symmetry spec, by default that of the models' type or of
    the module that runs the data. keep: groups that are neither moved nor taken apart.

    Groups behind a LayerNorm or RMSNorm, heads and what is in them are matched and merged, never
    taken apart. Where config.json has one size for several groups they are taken apart alike.

    Example::

        merged = merge.pleas(net_a, net_b, 1.2, data=batches)
        net = merged.module(net_a)
    """
    _check_options(by, count, budget, ratios, data, least_squares)
    first, second = open_checkpoint(a), open_checkpoint(b)
    first = reconcile([second, first])[1]
    check_shapes(first, second)
    task = None if data is None else task_of(data, a, first)
    own = symmetry_on(first, symmetry, task)
    if progress is not None:
        progress("units are matched")
    method = "weight" if by == "weights" else "activation"
    found = match_checkpoints(first, second, How(method, own, task, tuple(keep)))
    pair = (first, found.move(second))
    kinds, notes = _kinds(first, own, keep)
    fit = data is not None if least_squares is None else least_squares
    known = None
    if task is not None:
        from merge.parting_data import Networks

        known = Networks.of(task, pair, own, samples)
    if by == "weights":
        names = [n for n in own.tensors if _is_float(first, n) and n not in first.tied]
        alike = alike_by_weights(own, TensorsOf(pair[0]), TensorsOf(pair[1]), kinds, names)
    else:
        assert known is not None
        alike = known.alike(kinds)
    if count == "operations":
        assert known is not None
        weights = known.uses()
    else:
        weights = {n: 1.0 for n in own.tensors if _is_float(first, n) and n not in first.tied}
    places = places_of(own, kinds, weights)
    apart = _apart(own, kinds, alike, places, budget, ratios)
    members = {
        g: parted(own.groups[g].size, _least_alike(alike.get(g), own.groups[g].size, k))
        for g, k in apart.items()
    }
    couplings = couplings_of(members, 2)
    merged = joined_checkpoint(pair, own, members, couplings)
    errors: dict[str, tuple[float, float]] = {}
    whole = bool(apart) and all(k == own.groups[g].size for g, k in apart.items())
    if known is not None and not (whole and len(apart) == _moving(own)):
        merged, errors, told = known.finished(
            merged, couplings, fit=fit, sequential=sequential, ridge=ridge, progress=progress
        )
        notes += told
    used = {kinds[g]: k for g, k in apart.items()}
    stored = sum(math.prod(s.shape) for s in merged.values())
    return PartialMerge(
        checkpoint=replace(
            merged,
            label=f"pleas({short(first.label)}, {short(second.label)})",
            notes=(*first.notes, *notes),
        ),
        apart=apart,
        members=members,
        cost=cost(places, used) / cost(places, {}),
        stored=stored / sum(math.prod(s.shape) for s in first.values()),
        report=found.match.report,
        errors=errors,
        notes=tuple(notes),
    )  # fmt: skip


def _check_options(
    by: str,
    count: str,
    budget: float,
    ratios: float | Mapping[str, float] | None,
    data: object,
    least_squares: bool | None,
) -> None:
    for key, word, words in (("by", by, BY), ("count", count, COSTS)):
        check_word(word, words, key, f"{word!r} is no choice here")
    if not 1 <= budget <= 2:
        raise RecipeError(
            "the budget is how much larger than one network the result may be",
            key="budget",
            found=budget,
            expected="1 to 2",
        )
    for ratio in ratios.values() if isinstance(ratios, Mapping) else [ratios or 0.0]:
        if not 0 <= ratio <= 1:
            raise RecipeError(
                "a ratio is the share of units that stay apart",
                key="ratios",
                found=ratio,
                expected="0 to 1",
            )
    needs = {
        "by": by == "activations",
        "count": count == "operations",
        "least_squares": least_squares,
    }
    for key, wanted in needs.items():
        if wanted and data is None:
            raise RecipeError("this needs data, and none was given", key=key, do="give data")


def _kinds(
    checkpoint: Checkpoint, own: Symmetry, keep: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Groups that may be taken apart, each with its kind, and why others may not."""
    groups, reasons = separable(own, roles_of(own))
    kinds = {g: g for g in groups if g not in keep}
    notes = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    if checkpoint.side.config:
        keys = keys_of(checkpoint, own)
        silent = [g for g in kinds if keys.get(g) is None]
        if silent:
            notes.append(f"{', '.join(silent)}: config.json states no size of their own")
        kinds = {g: str(keys[g]) for g in kinds if keys.get(g) is not None}
    return kinds, notes


def _moving(own: Symmetry) -> int:
    return sum(bool(g.flags) for g in own.groups.values())


def _is_float(checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint.tensors and checkpoint.tensors[name].dtype.kind == "float"


def _apart(
    own: Symmetry,
    kinds: Mapping[str, str],
    alike: Mapping[str, NDArray[Any]],
    places: Sequence[Place],
    budget: float,
    ratios: float | Mapping[str, float] | None,
) -> dict[str, int]:
    """Of each group how many units stay apart."""
    import numpy as np

    if ratios is not None:
        return _by_ratio(own, kinds, ratios)
    gains: dict[str, Any] = {}
    for group, kind in kinds.items():
        scores = alike.get(group, np.zeros(own.groups[group].size))
        worth = np.sort(np.maximum(1.0 - scores, _LEAST))[::-1]
        gains[kind] = gains.get(kind, 0.0) + worth
    counts = chosen(places, gains, budget)
    return {g: counts[k] for g, k in kinds.items()}


def _by_ratio(
    own: Symmetry, kinds: Mapping[str, str], ratios: float | Mapping[str, float]
) -> dict[str, int]:
    given = ratios if isinstance(ratios, Mapping) else dict.fromkeys(kinds, ratios)
    for name in given:
        check_word(name, kinds, "ratios", f"there is no group {name!r} that could be taken apart")
    apart = {g: round(given.get(g, 0.0) * own.groups[g].size) for g in kinds}
    for kind in dict.fromkeys(kinds.values()):
        alike = {apart[g] for g, k in kinds.items() if k == kind}
        if len(alike) > 1:
            raise PlanError(
                "config.json has one size for groups with different ratios",
                key=kind,
                found=", ".join(f"{g}: {apart[g]}" for g, k in kinds.items() if k == kind),
                expected="one ratio for all of them",
            )
    return apart


def _least_alike(scores: NDArray[Any] | None, size: int, count: int) -> NDArray[Any]:
    """The ``count`` pairs that are least alike, in the order of the units."""
    import numpy as np

    order = np.arange(size) if scores is None else np.argsort(scores, kind="stable")
    return np.sort(order[:count])
