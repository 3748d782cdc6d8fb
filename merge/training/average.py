"""Averages of weights along a run: uniform soup or SWA, EMA, LAWA; BatchNorm measured anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError, RecipeError
from merge.statistics.norms import measure_norms
from merge.training.callback import Every

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["WeightAverage", "recalibrate"]

_KINDS = ("soup", "ema", "lawa")
_WIDE = 64  # summands from which on a mean is kept in float64


class WeightAverage(Every):
    """The average of a network's weights over a run.

    kind: ``soup``, the plain mean of all (Izmailov et al. 2018, arXiv:1803.05407; Wortsman et al.
    2022); ``ema``, m <- decay m + (1 - decay) w; ``lawa``, the mean of the last ``window``
    (Kaddour 2022, arXiv:2209.14981). every, on, start: after how many steps or epochs weights are
    taken, and from which on. batches: inputs on which BatchNorm is measured anew when the average
    is put into the network; its running statistics are averaged like weights otherwise. apply: put
    it into the network at the end of the run.

    Sums are in float32 at least, on the network's device; ``lawa`` keeps its copies on the CPU.

    Example::

        average = merge.WeightAverage("ema", every=10, on="step", decay=0.99)
        for step, batch in enumerate(loader, 1):
            train(model, batch)
            average.step(model, step)
        average.end(model)
    """

    def __init__(
        self,
        kind: str = "soup",
        *,
        every: int = 1,
        on: str = "epoch",
        start: int = 1,
        decay: float = 0.999,
        window: int = 5,
        batches: Iterable[Any] | None = None,
        apply: bool = True,
    ) -> None:
        super().__init__(every, on, start)
        if kind not in _KINDS:
            raise RecipeError(
                "no such average", key="kind", found=repr(kind), expected=", ".join(_KINDS)
            )
        if not 0.0 <= decay < 1.0:
            raise RecipeError("a decay is out of range", found=decay, expected="[0, 1)")
        if window < 1:
            raise RecipeError("too narrow a window", found=window, expected="1 or more")
        self.kind, self.decay, self.window = kind, decay, window
        self.batches, self.apply = batches, apply
        self.count = 0
        self._mean: dict[str, Tensor] = {}
        self._last: deque[dict[str, Tensor]] = deque(maxlen=window)

    def act(self, module: nn.Module) -> None:
        """Take the network's weights into the average."""
        import torch

        self.count += 1
        floats = {n: t.detach() for n, t in module.state_dict().items() if t.is_floating_point()}
        with torch.no_grad():
            if self.kind == "lawa":
                self._last.append({n: t.to("cpu", copy=True) for n, t in floats.items()})
                return
            share = 1.0 / self.count if self.kind == "soup" else 1.0 - self.decay
            if self.kind == "soup" and self.count == _WIDE:
                self._mean = {n: t.double() for n, t in self._mean.items()}
            for name, value in floats.items():
                known = self._mean.get(name)
                if known is None:
                    wide = torch.promote_types(value.dtype, torch.float32)
                    self._mean[name] = value.to(wide, copy=True)
                else:
                    known.lerp_(value.to(known), share)

    def average(self) -> dict[str, Tensor]:
        """The averaged tensors, in float32 or wider; PlanError before there are any."""
        if not self.count:
            raise PlanError(
                "there is nothing to average yet",
                found=f"start: {self.start}, every: {self.every} {self.on}",
                do="train for longer, or start earlier",
            )
        if self.kind != "lawa":
            return {n: t.clone() for n, t in self._mean.items()}
        import torch

        out: dict[str, Tensor] = {}
        for k, state in enumerate(self._last, 1):
            for name, value in state.items():
                wide = value.to(torch.promote_types(value.dtype, torch.float32))
                out[name] = wide.clone() if k == 1 else out[name].lerp_(wide, 1.0 / k)
        return out

    def put(self, module: nn.Module) -> None:
        """Load the average into the network, and measure BatchNorm anew where there is data."""
        state = module.state_dict()
        found = self.average()
        module.load_state_dict({**state, **{n: t.to(state[n]) for n, t in found.items()}})
        if self.batches is not None:
            recalibrate(module, self.batches)

    def end(self, module: nn.Module) -> None:
        """Put the average into the network, if it is to be there."""
        if self.apply and self.count:
            self.put(module)

    # -- to go on after a restart ------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """What has been gathered, to be saved beside the optimiser's state."""
        return {"count": self.count, "mean": dict(self._mean), "last": list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.count = int(state["count"])
        self._mean = dict(state["mean"])
        self._last = deque(state["last"], maxlen=self.window)


def recalibrate(module: nn.Module, batches: Iterable[Any]) -> int:
    """Measure the running statistics of BatchNorm anew; returns how many layers have some.

    Weights that were averaged have other activations than those whose statistics were. The mean
    over the batches, each weighing the same; other layers are as in evaluation. batches: tensors,
    tuples or mappings of the network's arguments. PlanError where there are none.
    """
    return len(measure_norms(module, batches))
