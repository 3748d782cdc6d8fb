"""Coefficients moved by gradients, and the merged tensors after them, a unit at a time.

Every unit (tensors that share numbers) is gone through once a step: the inner product of each part
with its tensor's gradient, the optimiser's step on those few numbers, and the change times the
parts added to the tensors, in place, while the parts are still at hand. Where a unit's parts
together are more than a block, or the gradient is clipped by its norm, they are read twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge.learning.coefficients import BASE, Coefficients
from merge.learning.latents import Latents
from merge.learning.layout import Layout, Unit
from merge.learning.network import TEMPERATURE, Job, Network
from merge.learning.parts import Part
from merge.learning.settings import Settings
from merge.learning.store import Store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BLOCK", "Mover", "under"]

BLOCK = 64 << 20
"""Bytes of a unit's parts that are held together; of larger ones there is one at a time."""


class Mover:
    """Latent numbers, their optimisers, and the tensors that follow them.

    fixed: coefficients of tensors that do not move. A tensor that has had no gradient in any step
    does not follow its block either: it has what the setting ``dead`` says.
    """

    def __init__(
        self,
        network: Network,
        latents: Latents,
        settings: Settings,
        fixed: Mapping[str, Tensor],
        jobs: Sequence[Job],
    ) -> None:
        self.network = network
        self.store: Store = network.store
        self.latents = latents
        self.layout: Layout = latents.layout
        self.settings = settings
        self.fixed = fixed
        self.jobs = jobs
        self.alive: dict[str, None] = {}
        self.stepped = False
        self.start: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}
        self.units = [
            Unit(u.rows, moving)
            for u in self.layout.units()
            if (moving := tuple(n for n in u.tensors if n not in network.still))
        ]
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        named = [n for unit in self.units for n in unit.tensors]
        widths = {self.layout.blocks[n]: self.layout.width(n) for n in named}
        self.columns = sum(widths.values())

    def begin(self) -> None:
        """Take the numbers as they are for the start, and make the optimisers."""
        import torch

        settings = self.settings
        self.start = self.latents.snapshot()
        self.first = self.network.wanted(self.latents, {})
        kinds: Mapping[str, Any] = {
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
            "sgd": torch.optim.SGD,
        }
        make, how = kinds[settings.optimiser], {"weight_decay": settings.decay}
        for unit in self.units:
            rows = self.latents.rows_of(unit)
            self.optimisers[f"unit/{unit.rows[0]}"] = make(rows, lr=settings.rate, **how)
        for job in self.jobs:
            if job.free:
                own = [t for n, t in job.free.items() if n != TEMPERATURE]
                temperature = [t for n, t in job.free.items() if n == TEMPERATURE]
                groups: list[dict[str, Any]] = [{"params": own}] if own else []
                if temperature:  # decay would pull it to 1
                    groups.append({"params": temperature, "weight_decay": 0.0})
                self.optimisers[f"free/{job.name}"] = make(groups, lr=settings.free_rate, **how)

    # -- coefficients as they stand ------------------------------------------------------------
    def wanted(self) -> dict[str, Tensor]:
        """The coefficients of every tensor."""
        return self.network.wanted(self.latents, {**self.fixed, **self.dead_values()})

    def dead(self) -> tuple[str, ...]:
        """Tensors that have had no gradient in any step so far."""
        if not self.stepped:
            return ()
        known = self.network.still | self.alive.keys()
        return tuple(n for n in self.network.tensors if n not in known)

    def dead_values(self) -> dict[str, Tensor]:
        """What those have for coefficients."""
        import torch

        out = {}
        for name in self.dead():
            out[name] = self.first[name]
            if self.settings.dead != "init":
                share = 0.0 if self.settings.dead == "zero" else 1.0 / self.store.source.count
                out[name] = torch.full_like(out[name], share)
                if (gates := self.layout.gates_of(name)) is not None:
                    out[name][:, gates:] = 0.0
                if self.layout.operands[-1] == BASE:
                    out[name][-1] = 1.0
        return out

    def coefficients(self) -> Coefficients:
        """The same, named."""
        known = {**self.fixed, **self.dead_values()}
        return self.latents.coefficients(known, str(self.store.prepare), self.settings.seed)

    def free(self) -> dict[str, Tensor]:
        """Copies of the tasks' own tensors that are learned."""
        return {
            f"{job.name}/{n}": t.detach().clone() for job in self.jobs for n, t in job.free.items()
        }

    # -- a step --------------------------------------------------------------------------------
    def step(self, number: int) -> int:
        """Use the gradients that the tensors have collected; how many units had none that count.

        number: of the step, counted from 0, for the schedule of the rate.
        """
        settings = self.settings
        for name, tensor in self.network.theta.items():
            if tensor.grad is not None:
                self.alive.setdefault(name)
        self.stepped = True
        factor = _factor(settings, number)
        lost = (
            sum(self._update(unit, settings.rate * factor) for unit in self.units)
            if settings.clip is None
            else self._update_clipped(settings.rate * factor, settings.clip)
        )
        for job in self.jobs:
            if job.free:
                self._advance(f"free/{job.name}", settings.free_rate * factor)
        for tensor in self.network.theta.values():
            tensor.grad = None
        if number == 0:  # now it is known which tensors have no gradient
            for name, wanted in self.dead_values().items():
                self._move(name, wanted, self.store.parts(name))
        return lost

    def _update(self, unit: Unit, rate: float) -> int:
        """Gradient, step and refresh of one unit; 1 if the gradient is not finite, else 0."""
        held: dict[str, list[Part]] | None = {} if self._fits(unit) else None
        found = self._gradients(unit, held)
        if found:
            self._advance(f"unit/{unit.rows[0]}", rate)
            self._refresh(unit, held)
        for name in unit.tensors:
            self.network.theta[name].grad = None
        return int(found is None)

    def _update_clipped(self, rate: float, clip: float) -> int:
        """The same with the norm of all gradients together bounded: every part is read twice."""
        import torch

        found = [(u, self._gradients(u, None)) for u in self.units]
        moved = [u for u, good in found if good]
        leaves = {id(t): t for u in moved for t in self.latents.rows_of(u) if t.grad is not None}
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), clip)
        for unit in moved:
            self._advance(f"unit/{unit.rows[0]}", rate)
            self._refresh(unit, None)
        return sum(good is None for _, good in found)

    def _fits(self, unit: Unit) -> bool:
        """Whether the unit's parts, which are made for each use, may be held together."""
        if all(self.store.keeps(n) for n in unit.tensors):
            return False
        size = sum(self.network.theta[n].nbytes for n in unit.tensors)
        return size * len(self.layout.operands) <= BLOCK

    def _gradients(self, unit: Unit, held: dict[str, list[Part]] | None) -> bool | None:
        """Pull the tensors' gradients back to the unit's rows. held: parts are put there.

        False where there are none, None where they are not finite.
        """
        import torch

        found: dict[str, Tensor] = {}
        for name in unit.tensors:
            gradient = self.network.theta[name].grad
            if gradient is None:
                continue
            kind, width = self.layout.kinds[name], self.layout.width(name)
            rows = []
            for part in self.store.parts(name):
                rows.append(part.pull_back(gradient, kind, width))
                if held is not None:
                    held.setdefault(name, []).append(part)
            found[name] = torch.stack(rows)
        if found and self.settings.lp is not None:
            self._add_norm(found, self.settings.lp)
        if not found:
            return False
        if not all(bool(torch.isfinite(g).all()) for g in found.values()):
            return None
        for row in self.latents.rows_of(unit):
            row.grad = None
        self.latents.pull_back(found)
        if self.settings.pull:
            with torch.no_grad():
                for name, row in self._rows(unit):
                    if row.grad is not None:
                        row.grad += 2 * self.settings.pull * (row - self.start[name])
        return True

    def _add_norm(self, found: Mapping[str, Tensor], p: int) -> None:
        """Add the gradient of the coefficients' Lp norm, a block at a time; 0 where all are 0."""
        import torch

        experts, seen = self.store.source.count, set()
        for name, gradient in found.items():
            if (block := self.layout.blocks[name]) in seen:
                continue
            seen.add(block)
            with torch.no_grad():
                c = self.latents.coefficients_of(name)[:experts].detach()
                slope = c.sign() if p == 1 else c / c.norm(dim=0).clamp_min(1e-300)
                share = self.settings.lp_weight / self.columns
                gradient[:experts] += (share * slope).reshape_as(gradient[:experts])

    def _rows(self, unit: Unit) -> Iterator[tuple[str, Tensor]]:
        leaves = {id(t) for t in self.latents.rows_of(unit)}
        return ((n, t) for n, t in self.latents.rows.items() if id(t) in leaves)

    def _advance(self, key: str, rate: float) -> None:
        optimiser = self.optimisers[key]
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def _refresh(self, unit: Unit, held: dict[str, list[Part]] | None) -> None:
        """Bring the unit's tensors to its new coefficients."""
        import torch

        self.latents.project(unit)
        for name in unit.tensors:
            if name in self.alive:
                with torch.no_grad():
                    wanted = self.latents.coefficients_of(name).detach()
                known = None if held is None else held.get(name)
                self._move(name, wanted, self.store.parts(name) if known is None else known)

    def _move(self, name: str, wanted: Tensor, parts: Iterator[Part] | Sequence[Part]) -> None:
        import torch

        if not torch.equal(wanted, self.network.applied[name]):
            self.network.move(name, wanted, parts, self.layout.kinds[name])

    # -- states --------------------------------------------------------------------------------
    def saved(self) -> dict[str, Tensor]:
        """Copies of rows, moments of the optimisers, and tensors of the tasks' own."""
        out = {f"row/{n}": t for n, t in self.latents.snapshot().items()}
        out |= {f"free/{n}": t for n, t in self.free().items()}
        for number, optimiser in enumerate(self.optimisers.values()):
            for i, moments in optimiser.state_dict()["state"].items():
                for word, value in moments.items():
                    if value is not None:
                        out[f"moment/{number}/{i}/{word}"] = value.detach().clone()
        return out

    def take_up(self, saved: Mapping[str, Tensor], alive: Sequence[str], stepped: bool) -> None:
        """Go on from what `saved` copied. stepped: there was a step before that."""
        import torch

        self.alive, self.stepped = dict.fromkeys(alive), stepped
        self.latents.restore(under(saved, "row/"))
        with torch.no_grad():
            for job in self.jobs:
                for name, value in job.free.items():
                    value.copy_(saved[f"free/{job.name}/{name}"])
        for number, optimiser in enumerate(self.optimisers.values()):
            document = optimiser.state_dict()
            found: dict[int, dict[str, Tensor]] = {}
            for path, value in under(saved, f"moment/{number}/").items():
                index, _, word = path.partition("/")
                found.setdefault(int(index), {})[word] = value.clone()
            document["state"] = found
            optimiser.load_state_dict(document)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, under the rest of their names."""
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}


def _factor(settings: Settings, step: int) -> float:
    """What the schedule makes of the rate in a step, counted from 0."""
    if settings.schedule == "linear":
        return 1.0 - step / max(1, settings.steps)
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / max(1, settings.steps)))
    return 1.0
