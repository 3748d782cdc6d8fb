"""Decay towards the weights that a fine-tune began with, instead of towards zero.

AdamR (of DAREx, Deng et al. 2024, arXiv:2410.09344) keeps a fine-tune near its base, so that most
of its difference can be dropped later::

    theta <- theta - min(w, 1) (theta - theta0),   w = wd lr / sqrt(mean v^)      (l2)
    theta <- theta - clamp(theta - theta0, -w, w)                                  (l1)

decoupled, after the optimiser's own step; v^ is Adam's second moment without its bias, of which the
mean is over the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError, RecipeError
from merge.training.callback import Callback

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["AnchorDecay"]


class AnchorDecay(Callback):
    """Pulls weights back to an anchor after each step of an optimiser.

    anchor: tensors by the module's names, such as a state dict taken before the run; they are held,
    not copied, where they lie on the weights' device. What it does not name is not pulled.
    weight_decay: wd above. kind: ``l2`` or ``l1``. adaptive: divide by Adam's second moments;
    without, w = wd lr. The optimiser's own weight_decay pulls towards zero: set it to 0.

    Example::

        start = {n: t.clone() for n, t in model.state_dict().items()}
        merge.AnchorDecay(start).begin(model, optimizer)     # then train as usual
    """

    def __init__(
        self,
        anchor: Mapping[str, Tensor],
        *,
        weight_decay: float = 1e-4,
        kind: str = "l2",
        adaptive: bool = True,
    ) -> None:
        if kind not in ("l1", "l2"):
            raise RecipeError("no such decay", key="kind", found=repr(kind), expected="l2 or l1")
        if not weight_decay >= 0.0:
            raise RecipeError("a decay is out of range", found=weight_decay, expected="0 or more")
        self.anchor, self.weight_decay = anchor, weight_decay
        self.kind, self.adaptive = kind, adaptive
        self._goals: dict[Any, Tensor] = {}
        self._handle: Any = None

    def begin(self, module: nn.Module, optimizer: Any = None) -> None:
        """Follow the optimiser's steps from now on."""
        inner = getattr(optimizer, "optimizer", optimizer)  # what a wrapper steps
        if inner is None:
            raise PlanError("a pull after each step needs the optimiser", expected="optimizer=")
        self._goals = {}
        for name, parameter in module.named_parameters():
            goal = self.anchor.get(name)
            if goal is None:
                continue
            if goal.shape != parameter.shape:
                raise PlanError(
                    "the anchor has another shape than the weight",
                    tensor=name,
                    found=list(goal.shape),
                    expected=list(parameter.shape),
                )
            self._goals[parameter] = goal.detach().to(parameter)
        if not self._goals:
            raise PlanError(
                "the anchor has none of the network's weights",
                found=", ".join(list(self.anchor)[:3]),
                expected=", ".join([n for n, _ in module.named_parameters()][:3]),
            )
        self.remove()
        self._handle = inner.register_step_post_hook(self._after)

    def end(self, module: nn.Module) -> None:
        """Leave the optimiser alone."""
        self.remove()

    def remove(self) -> None:
        """Follow the optimiser no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _after(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        import torch

        with torch.no_grad():
            for group in optimizer.param_groups:
                # what had no gradient has not moved
                own = [p for p in group["params"] if p in self._goals and p.grad is not None]
                if own:
                    self._pull(own, self._steps(optimizer, group, own))

    def _steps(self, optimizer: Any, group: Mapping[str, Any], own: list[Tensor]) -> list[float]:
        """w of each tensor."""
        import torch

        rate = self.weight_decay * float(group["lr"])
        if not self.adaptive:
            return [rate] * len(own)
        states = [optimizer.state[p] for p in own]
        if any("exp_avg_sq" not in s for s in states):
            raise PlanError(
                "the optimiser keeps no second moments to divide by",
                found=type(optimizer).__name__,
                expected="Adam or AdamW",
                do="use AnchorDecay(..., adaptive=False)",
            )
        beta = group["betas"][1]
        moments = [s["exp_avg_sq"] for s in states]
        wide = [torch.promote_types(m.dtype, torch.float32) for m in moments]
        means = [m.mean(dtype=w) for m, w in zip(moments, wide, strict=True)]
        values = torch.stack([m.double() for m in means]).tolist()  # one wait for the device
        bias = [1.0 - beta ** float(s["step"]) for s in states]
        pairs = zip(values, bias, strict=True)
        return [rate / ((v / b) ** 0.5 + group["eps"]) for v, b in pairs]

    def _pull(self, own: list[Tensor], steps: list[float]) -> None:
        import torch

        goals = [self._goals[p] for p in own]
        if self.kind == "l2":
            torch._foreach_lerp_(own, goals, [min(1.0, w) for w in steps])
            return
        ways = torch._foreach_sub(own, goals)
        torch._foreach_clamp_max_(ways, steps)
        torch._foreach_clamp_min_(ways, [-w for w in steps])
        torch._foreach_sub_(own, ways)
