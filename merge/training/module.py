"""A network whose weights are a merge, and whose parameters are the coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merge.errors import PlanError
from merge.learning.coefficients import Coefficients, Kind
from merge.learning.latents import Latents
from merge.learning.layout import Link, layout_of
from merge.learning.parts import Part
from merge.training.deltas import Delta, directions_of, layer_of, moved, numbered, parts_of

__all__ = ["MergedModule"]


class MergedModule(nn.Module):
    """A network with the weights ``base + sum_k c_k delta_k``, to be trained by its coefficients.

    ``parameters()`` are the latent numbers of the coefficients, float64, so that any optimiser or
    trainer can drive them; the network's own weights, the base and the differences do not move. The
    gradient of a coefficient is the inner product of the weight's gradient with its difference,
    taken as soon as that gradient is there: autograd keeps nothing of the merge.

    template: the network's code; its weights are left as they are. base: its tensors by name.
    deltas: for each expert its differences to the base, dense or as `Part` of merge.learning; a
    tensor that an expert lacks is the base's, and so are buffers, such as BatchNorm's statistics
    (`merge.recalibrate` measures those anew). granularity, init, link,
    bounds, groups: as of `merge.learn`. dropout: whether `train` reaches the template; by default
    it stays in evaluation mode, as coefficients are few and need no noise.

    Example::

        merged = merge.MergedModule(model, base.state_dict(), {"a": delta_a, "b": delta_b})
        optimiser = torch.optim.Adam(merged.parameters(), lr=1e-2)
        loss = criterion(merged(inputs), target)
        loss.backward()
        optimiser.step()
        model.load_state_dict(merged.merged_state())
    """

    def __init__(
        self,
        template: nn.Module,
        base: Mapping[str, Tensor],
        deltas: Mapping[str, Delta] | Sequence[Delta],
        *,
        granularity: str = "layer",
        init: float | Mapping[str, float] | Coefficients = 0.3,
        link: str = "identity",
        bounds: tuple[float, float] = (0.0, 1.0),
        groups: Sequence[tuple[str, str]] = (),
        seed: int = 0,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        experts = deltas if isinstance(deltas, Mapping) else numbered(deltas)
        self._dropout = dropout
        self._template = (template,)  # in a tuple, so that its weights are no parameters of this
        self._base = _fitting(template, base)
        weights = {n for n, _ in template.named_parameters()}
        self._parts = parts_of({n: t for n, t in self._base.items() if n in weights}, experts, seed)
        shapes = {n: tuple(self._base[n].shape) for n in self._parts}
        self.latents = Latents(
            layout_of(
                tuple(experts),
                shapes,
                granularity,
                Link(link, *bounds),
                layer_of=layer_of,
                groups=groups,
                directions=directions_of(self._parts),
            ),
            init,
        )
        self._seed = seed
        for name, row in self.latents.rows.items():
            parameter = nn.Parameter(row.detach())
            self.latents.rows[name] = parameter
            self.register_parameter(_plain(name), parameter)
        template.train(template.training if dropout else False)

    @property
    def template(self) -> nn.Module:
        """The network's code."""
        return self._template[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network returns with the merged weights."""
        state = self._state()
        return torch.func.functional_call(self.template, state, args, kwargs)

    def _state(self) -> dict[str, Tensor]:
        self.latents.project()
        kinds, state = self.latents.layout.kinds, dict(self._base)
        for name, parts in self._parts.items():
            numbers = self.latents.coefficients_of(name)
            plan = _Plan(self._base[name], parts, kinds[name])
            state[name] = _Merge.apply(plan, numbers)  # type: ignore[no-untyped-call]
        return state

    def merged_state(self) -> dict[str, Tensor]:
        """The merged tensors, of all that the template has, as they stand."""
        with torch.no_grad():
            state = self._state()
        whole = {n: t.detach() for n, t in self.template.state_dict().items()}
        shared = _names_of(self.template)
        for name, value in state.items():
            whole.update(dict.fromkeys(shared.get(name, [name]), value))
        return {n: t.clone() for n, t in whole.items()}

    def coefficients(self) -> Coefficients:
        """The coefficients by name: `to_json` saves them, `merge.apply_coefficients` uses them."""
        self.latents.project()
        return self.latents.coefficients({}, seed=self._seed)

    def train(self, mode: bool = True) -> MergedModule:
        """Set the mode of the template too, if dropout was asked for."""
        super().train(mode)
        if self._dropout:
            self.template.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergedModule:
        """Moves and casts the network with all that it is merged of; coefficients stay float64."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self.parameters():
            parameter.data = parameter.data.double()
        self.template._apply(fn)  # type: ignore[no-untyped-call]
        self._base = {n: fn(t) for n, t in self._base.items()}
        self._parts = {n: [moved(p, fn) for p in parts] for n, parts in self._parts.items()}
        return self


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """How one tensor is merged."""

    base: Tensor
    parts: Sequence[Part]
    kind: Kind


class _Merge(torch.autograd.Function):
    """One merged tensor of its coefficients, (operands, width)."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, numbers: Tensor) -> Tensor:
        ctx.plan, ctx.shape, ctx.device = plan, numbers.shape, numbers.device
        out = plan.base.detach().clone(memory_format=torch.contiguous_format)
        for part, step in zip(plan.parts, numbers.detach(), strict=True):
            part.add_to(out, step, plan.kind)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (gradient,) = gradients
        plan, width = ctx.plan, ctx.shape[1]
        rows = [p.pull_back(gradient.contiguous(), plan.kind, width) for p in plan.parts]
        return None, torch.stack([r.double().to(ctx.device) for r in rows]).reshape(ctx.shape)


def _fitting(template: nn.Module, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's tensors by names of the template, each once; PlanError where one is not there."""
    shared = _names_of(template)
    wanted = {n: t for n, t in template.state_dict().items() if shared.get(n, [n])[0] == n}
    found: dict[str, Tensor] = {}
    for name, own in wanted.items():
        value = next((base[n] for n in shared.get(name, [name]) if n in base), None)
        if value is None or value.shape != own.shape:
            raise PlanError(
                "the base does not have a tensor of the network",
                tensor=name,
                found="no such tensor" if value is None else list(value.shape),
                expected=list(own.shape),
            )
        found[name] = value.detach()
    return found


def _names_of(module: nn.Module) -> dict[str, list[str]]:
    """All names of each tensor, by each of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {n: same for same in names.values() for n in same}


def _plain(name: str) -> str:
    """A row's name as a parameter's, which may hold no dot."""
    return name.replace(".", "/")
