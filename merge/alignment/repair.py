"""Statistics of a merged network put right: REPAIR, and BatchNorm reset.

Averaging units that are alike but not equal shrinks the variance of what they answer, layer by
layer. REPAIR (Jordan et al. 2023, arXiv:2211.08403) gives each unit before its nonlinearity the
mean and the standard deviation that the parents have on average::

    goal mean = sum_i w_i mean_i        goal deviation = sum_i w_i deviation_i
    W <- g W,  b <- g (b - mean) + goal mean,  g = goal deviation / deviation

Layers are put right in the order in which they run, each on what the repaired ones before it
answer, so one pass over the data is needed for each. A layer without bias gets its deviation only.
Networks with BatchNorm need no more than its statistics measured anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError
from merge.statistics.norms import batch_norms, measure_norms
from merge.statistics.runs import run

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Repaired", "repair"]

_DEAD = 1e-6
"""Deviations below this share of the layer's median are of units that never change: left alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Repaired:
    """Tensors that replace those of the merged network, and what was done to which layer."""

    tensors: dict[str, Tensor]
    layers: tuple[str, ...]
    kind: str  # "BatchNorm reset" or "REPAIR"
    notes: tuple[str, ...] = ()


def repair(
    module: nn.Module,
    merged: Mapping[str, Tensor],
    parents: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
) -> Repaired:
    """What gives the merged network its parents' statistics on the data.

    module: the network's code; its own weights are put back. parents: in the merged network's
    coordinates, that is, aligned. weights: of the parents in the merge, equal by default; they are
    scaled to sum to 1. PlanError where there is no data, and nothing to put right.
    """
    data = list(batches)
    if not data:
        raise PlanError(
            "there is no data to measure statistics on",
            found="no batches",
            expected="a few hundred samples of what the network is for",
            do="give data, or leave out the repair",
        )
    own = {n: t.detach().clone() for n, t in module.state_dict().items()}
    training = module.training
    try:
        if batch_norms(module):
            return _reset(module, merged, data)
        share = [1.0] * len(parents) if weights is None else list(weights)
        share = [w / sum(share) for w in share]
        return _repaired(module, merged, parents, data, share)
    finally:
        module.load_state_dict(own)
        module.train(training)


# -- BatchNorm -------------------------------------------------------------------------------------
def _reset(module: nn.Module, merged: Mapping[str, Tensor], data: Sequence[Any]) -> Repaired:
    """Running statistics as the plain mean over the batches, each weighing the same."""
    module.load_state_dict(dict(merged))
    norms = measure_norms(module, data)
    state = module.state_dict()
    changed = {
        f"{name}.{part}": state[f"{name}.{part}"].clone()
        for name in norms
        for part in ("running_mean", "running_var", "num_batches_tracked")
    }
    return Repaired(changed, norms, "BatchNorm reset")


# -- networks without it ---------------------------------------------------------------------------
def _repaired(
    module: nn.Module,
    merged: Mapping[str, Tensor],
    parents: Sequence[Mapping[str, Tensor]],
    data: Sequence[Any],
    share: Sequence[float],
) -> Repaired:
    import torch

    module.eval()
    order = _order(module, data[0])
    if not order:
        raise PlanError(
            "the network has no layer whose statistics could be put right",
            expected="linear maps or convolutions before a nonlinearity, or BatchNorm",
        )
    goals: dict[str, tuple[Tensor, Tensor]] = {}
    for weight, parent in zip(share, parents, strict=True):
        module.load_state_dict(dict(parent))
        for name, (mean, deviation) in _statistics(module, order, data).items():
            old = goals.get(name, (torch.zeros_like(mean), torch.zeros_like(mean)))
            goals[name] = (old[0] + weight * mean, old[1] + weight * deviation)
    module.load_state_dict(dict(merged))
    changed: dict[str, Tensor] = {}
    plain = []
    layers = dict(module.named_modules())
    for name in order:
        mean, deviation = _statistics(module, [name], data)[name]
        gain = goals[name][1] / deviation
        dead = deviation < _DEAD * deviation.median()
        gain = torch.where(dead | ~gain.isfinite(), 1.0, gain)
        layer = layers[name]
        with torch.no_grad():
            weight = layer.weight
            shape = [1] * weight.ndim
            shape[_rows(layer)] = -1
            weight.copy_(weight.double() * gain.reshape(shape))
            changed[f"{name}.weight"] = weight.detach().clone()
            if layer.bias is not None:
                layer.bias.copy_(gain * (layer.bias.double() - mean) + goals[name][0])
                changed[f"{name}.bias"] = layer.bias.detach().clone()
            else:
                plain.append(name)
    notes = [f"{len(plain)} layers have no bias: their means stay"] if plain else []
    return Repaired(changed, tuple(order), "REPAIR", tuple(notes))


def _rows(layer: Any) -> int:
    """Which axis of a layer's weight counts its outputs."""
    from torch import nn

    conv_transpose = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return int(conv_transpose or type(layer).__name__ == "Conv1D")


def _order(module: nn.Module, batch: Any) -> list[str]:
    """Linear maps and convolutions in the order in which they run, but for the last and for those
    whose weights another layer shares."""
    from torch import nn

    found: dict[str, None] = {}
    shared: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    hooks = []
    for name, layer in module.named_modules():
        linear = isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
        if (linear or type(layer).__name__ == "Conv1D") and shared[id(layer.weight)] == 1:

            def note(_layer: Any, _args: Any, _out: Any, name: str = name) -> None:
                found.pop(name, None)
                found[name] = None

            hooks.append(layer.register_forward_hook(note))
    run(module, batch)
    for hook in hooks:
        hook.remove()
    return list(found)[:-1]


def _statistics(
    module: nn.Module, names: Sequence[str], data: Sequence[Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each unit of layers, in float64 over all of the data."""
    from torch import nn

    sums: dict[str, list[Any]] = {}
    layers = dict(module.named_modules())
    hooks = []
    for name in names:
        channel = 1 if isinstance(layers[name], nn.modules.conv._ConvNd) else -1

        def add(
            _layer: Any, _args: Any, out: Tensor, name: str = name, channel: int = channel
        ) -> None:
            rows = out.detach().movedim(channel, -1).flatten(0, -2).double()
            new = [len(rows), rows.mean(0), rows.var(0, correction=0) * len(rows)]
            if name not in sums:
                sums[name] = new
                return
            count, mean, squares = sums[name]
            total = count + new[0]
            step = new[1] - mean
            sums[name] = [
                total,
                mean + step * (new[0] / total),
                squares + new[2] + step**2 * (count * new[0] / total),
            ]

        hooks.append(layers[name].register_forward_hook(add))
    for batch in data:
        run(module, batch)
    for hook in hooks:
        hook.remove()
    return {name: (mean, (s / count).sqrt()) for name, (count, mean, s) in sums.items()}
