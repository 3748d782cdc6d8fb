"""The self-check: a random element of a derived symmetry must leave the network's outputs alone.

A derivation is never trusted without it. Where it fails, groups are tried one by one, and those
that change the outputs lose what they may not do, with a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from merge.errors import SourceError
from merge.symmetry.action import apply
from merge.symmetry.elements import Element, random_element
from merge.symmetry.symmetry import Group, Symmetry
from merge.tracing.mode import plain_operators
from merge.tracing.precision import double_precision
from merge.tracing.trace import Pick, all_of, state_of, tensors_in

__all__ = ["TOLERANCE", "Check", "verified"]

TOLERANCE = 1e-10
"""Largest difference relative to the largest output, in float64."""

SINGLE = 1e-5
"""The same where the model computes in float32 by itself."""

KINDS = ("P", "PSDR", "S", "D")


class Check:
    """A module and inputs, against which elements are tried.

    ``outputs`` is the symmetry of the module's outputs where these are not frozen: then they are
    expected to move along. ``single`` tells that the module computes in float32 by itself.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[Any] | Mapping[str, Any],
        outputs: Symmetry | None = None,
        *,
        single: bool = False,
        pick: Pick = all_of,
    ) -> None:
        self.module, self.inputs, self.pick = module, inputs, pick
        self.tolerance, self.outputs, self.single = TOLERANCE, outputs, single
        self.worst = 0.0
        self.state = {n: t.detach() for n, t in state_of(module).items()}
        self.expected = self.run(self.state)
        if not self.expected or not all(t.isfinite().all() for t in self.expected.values()):
            raise SourceError(
                "the network returns nothing that a symmetry could be checked by",
                found="no output of floats, or one that is not finite",
                expected="finite outputs for random weights",
                do="give example inputs for which all outputs are finite",
            )

    def run(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs with these weights; masked places, which are infinite, as zeros."""
        args, kwargs = ((), self.inputs) if isinstance(self.inputs, Mapping) else (self.inputs, {})
        with plain_operators(), double_precision():
            out = torch.func.functional_call(
                self.module, dict(state), tuple(args), dict(kwargs), tie_weights=False
            )
        found = {n: t for n, t in tensors_in(self.pick(out), "output") if t.is_floating_point()}
        return {
            n: torch.where(t.isneginf(), 0.0, t).double() for n, t in found.items() if t.numel()
        }

    def deviation(self, symmetry: Symmetry, element: Element) -> float:
        """Largest difference of outputs, relative to the largest of each output."""
        expected = self.expected
        with plain_operators():
            found = self.run(apply(symmetry, self.state, element))
            if self.outputs is not None:
                named = {n: t for n, t in expected.items() if n in self.outputs.tensors}
                expected = {**expected, **apply(self.outputs, named, element)}
        worst = 0.0
        for name, wanted in expected.items():
            difference = (found[name] - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
            worst = max(worst, float(difference.nan_to_num(nan=1e9)))
        return worst

    def holds(self, symmetry: Symmetry, names: Sequence[str], kinds: str, seed: int = 1) -> bool:
        """Whether a random element of these groups leaves the outputs alone."""
        element = random_element(symmetry, seed, kinds)
        part = {n: m for n, m in element.items() if n in names}
        return self.deviation(symmetry, part) < self.tolerance


def verified(check: Check, symmetry: Symmetry) -> Symmetry:
    """The symmetry, without what the check refuses; its notes say what that was."""
    names = list(symmetry.groups)
    for _ in range(4 * len(names) + 4):
        found = {k: check.deviation(symmetry, random_element(symmetry, 1, k)) for k in KINDS}
        if check.single and TOLERANCE <= max(found.values()) < SINGLE:
            check.tolerance = SINGLE
        wrong = next((k for k, d in found.items() if d >= check.tolerance), None)
        if wrong is None:
            check.worst = max(found.values())
            return symmetry
        symmetry = _reduced(check, symmetry, wrong)
    raise SourceError(
        "no symmetry of the network could be confirmed",
        found="outputs that change although no group is moved",
        expected="the same outputs for the same weights",
        do="check that the network is deterministic in evaluation mode",
    )


def _reduced(check: Check, symmetry: Symmetry, kinds: str) -> Symmetry:
    """The symmetry with less freedom in the first group that is at fault."""
    name = _culprit(check, symmetry, kinds)
    group = symmetry.groups[name]
    for smaller in _smaller(group, kinds):
        changed = _with(symmetry, smaller)
        if check.holds(changed, [name], kinds):
            return _noted(changed, group, smaller)
    last = replace(group, flags="", per=(), reason="failed the numerical check")
    return _noted(_with(symmetry, last), group, last)


def _culprit(check: Check, symmetry: Symmetry, kinds: str) -> str:
    """The first group that changes the outputs, alone or together with those before it."""
    names = [n for n, g in symmetry.groups.items() if g.flags]
    for name in names:
        if not check.holds(symmetry, [name], kinds):
            return name
    for count in range(1, len(names) + 1):
        if not check.holds(symmetry, names[:count], kinds):
            return names[count - 1]
    return names[-1]


def _smaller(group: Group, kinds: str) -> Iterator[Group]:
    """The group with less and less freedom: no dependence, then fewer kinds of moves."""
    if group.per:
        yield replace(group, per=())
    for dropped in ("R", "D", "S"):
        if dropped in kinds and dropped in group.flags:
            flags = "".join(f for f in group.flags if f != dropped)
            yield replace(group, flags=flags)
    if len(kinds) > 1 or kinds != "P":
        yield replace(group, flags="P")
        yield replace(group, flags="P", per=())


def _with(symmetry: Symmetry, group: Group) -> Symmetry:
    return replace(symmetry, groups={**symmetry.groups, group.name: group})


def _noted(symmetry: Symmetry, old: Group, new: Group) -> Symmetry:
    lost = [f"its moves {old.flags}" if not new.flags else ""]
    if new.flags and set(old.flags) - set(new.flags):
        lost.append(f"moves {''.join(f for f in old.flags if f not in new.flags)}")
    if set(old.per) - set(new.per):
        lost.append(f"its dependence on {', '.join(old.per)}")
    where = next(iter(symmetry.places(old.name)), "")
    text = f"the group of {where} lost {' and '.join(t for t in lost if t)}: the check failed"
    return replace(symmetry, notes=(*symmetry.notes, text))
