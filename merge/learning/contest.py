"""Candidates tried against one another on validation data; the best of them is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from merge.learning.coefficients import Coefficients
from merge.learning.judge import Candidate, Judge
from merge.learning.network import Network
from merge.learning.objectives import Negation
from merge.learning.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Contest"]

_LOST = 4  # scales in a row without a gain, after which no further one is tried


@dataclass(slots=True, eq=False)
class Contest:
    """All that was scored, and the best. measure: puts statistics right before a score."""

    judge: Judge
    network: Network
    settings: Settings
    experts: tuple[str, ...]
    measure: Callable[[], None] | None = None
    trials: list[Candidate] = field(default_factory=list)
    best: Candidate | None = None
    free: dict[str, Tensor] = field(default_factory=dict)  # what tasks had learned by then

    def enter(
        self,
        name: str,
        coefficients: Callable[[], Coefficients],
        free: Mapping[str, Tensor],
        *,
        as_is: bool = False,
    ) -> Candidate:
        """Score the network's tensors as they are; keep them if nothing was as good.

        as_is: the network's statistics are not to be measured anew.
        """
        if self.measure is not None and not as_is:
            self.measure()
        found = self.judge.candidate(name, self.network.theta)
        self.trials.append(found)
        best = self.best
        if found.allowed and (best is None or not best.allowed or found.score > best.score):
            self.best = replace(found, coefficients=coefficients())
            self.free = dict(free)
        return found

    def enter_simple(self, free: Mapping[str, Tensor]) -> float | None:
        """Score the base and scales of the plain and of the prepared differences' sum.

        Scales are gone through until four in a row were no better than one before them.

        Returned is the best scale of the prepared ones, if they were tried.
        """
        settings, network = self.settings, self.network
        tuned = settings.init == "tuned"
        if "base" in settings.candidates or isinstance(self.judge.objective, Negation):
            network.load(network.store.source.base)
            self.enter("base", lambda: self._uniform(0.0, "none"), free, as_is=True)
        prepared = str(network.store.prepare)
        found: tuple[float, float] | None = None
        for kind in dict.fromkeys(("none", prepared)):
            if "task_arithmetic" not in settings.candidates and not (tuned and kind == prepared):
                continue
            label = "task arithmetic" if kind == "none" else kind
            top, since = -math.inf, 0
            for scale in self._scaled(kind == prepared):
                if since == _LOST:
                    break
                one = self.enter(
                    f"{label} at {scale:g}",
                    lambda s=scale, k=kind: self._uniform(s, k),  # type: ignore[misc]
                    free,
                )
                top, since = max(top, one.score), 0 if one.score > top else since + 1
                if kind == prepared and one.allowed and (found is None or one.score > found[0]):
                    found = (one.score, scale)
        return None if found is None else found[1]

    def _uniform(self, value: float, prepare: str) -> Coefficients:
        network = self.network
        return Coefficients.uniform(
            self.experts, network.tensors, value, prepare, self.settings.seed
        )

    def _scaled(self, prepared: bool) -> Iterator[float]:
        """Bring the network to each scale in turn: ``origin + scale * sum of parts``."""
        import torch

        network, store = self.network, self.network.exact
        total: dict[str, Tensor] = {}
        one = torch.ones(1, dtype=torch.float64)
        with torch.no_grad():
            for name in network.tensors:
                plain = not prepared or store.learns_base
                value = store.source.base(name) if plain else store.origin(name)
                network.put(name, value)
                if name in store.empty:
                    continue
                total[name] = torch.zeros_like(value)
                if prepared:
                    experts = zip(range(store.source.count), store.parts(name), strict=False)
                    for _, part in experts:
                        part.add_to(total[name], one, "whole")
                else:
                    for i in range(store.source.count):
                        total[name] += store.source.delta(i, name)
        at = 0.0
        sign = -1.0 if isinstance(self.judge.objective, Negation) else 1.0
        for scale in self.settings.scales:
            with torch.no_grad():
                for name, summed in total.items():
                    network.theta[name].add_(summed, alpha=sign * scale - at)
            at = sign * scale
            yield at
