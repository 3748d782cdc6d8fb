"""Two networks cut and joined: the first blocks of one, a fitted linear map, the last of another.

Stitchable networks (Pan et al. 2023, arXiv:2302.06586): the map is the least-squares solution
M = argmin || X1 M - X2 ||^2 + r tr(X1' X1) / n || M ||^2 between what the first network gives at
its cut and what the second takes at its own, on the same data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from merge.errors import PlanError
from merge.resize.influence import stream_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Stitched", "stitched"]


class _Reached(Exception):
    """No error: a network has run as far as it should."""


class _Pass(nn.Module):
    """In the place of a block that is left out."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given,) if self.in_tuple else given


class Stitched(nn.Module):
    """Runs ``front`` through block ``front_cut``, the stitch, then ``back`` from ``back_cut`` on.

    Takes what both networks take. error: what the stitch leaves of the second network's stream at
    its cut, as a share of its variance, on the data that it was fitted to.
    """

    def __init__(
        self, front: nn.Module, front_cut: str, back: nn.Module, back_cut: str, stitch: nn.Linear
    ) -> None:
        super().__init__()
        self.front, self.back, self.stitch = front, back, stitch
        self.front_cut, self.back_cut = front_cut, back_cut
        self.error = float("nan")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.stitch(self._first(*args, **kwargs))

        def enter(_part: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if given:
                return (found.to(given[0].dtype), *given[1:]), named
            return given, {**named, "hidden_states": found}

        part = self.back.get_submodule(self.back_cut)
        handle = part.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            return self.back(*args, **kwargs)
        finally:
            handle.remove()

    def _first(self, *args: Any, **kwargs: Any) -> Tensor:
        return _stream_after(self.front, self.front_cut, args, kwargs)


def stitched(
    front: nn.Module,
    back: nn.Module,
    cut: tuple[str, str],
    batches: Sequence[Any],
    rows: Any,
    ridge: float = 1e-4,
) -> Stitched:
    """Both networks joined: ``front`` through the block ``cut[0]``, ``back`` from ``cut[1]`` on.

    rows: from a batch and a hidden state to the rows that count. One pass of both networks over the
    data. The networks that are given are left as they are. PlanError for names of no block, and
    where the two do not see the same rows.
    """
    if not batches:
        raise PlanError("there is no data to fit a stitch to", found="no batches")
    for module, name in zip((front, back), cut, strict=True):
        if name not in dict(module.named_modules()):
            raise PlanError(
                "a network has no block of that name",
                network=type(module).__name__,
                found=name,
                expected="the name of a module, such as layers.3",
            )
    gram: Any = 0.0
    cross: Any = 0.0
    energy: Any = 0.0
    for batch in batches:
        args, kwargs = _arguments(batch)
        x = rows(batch, _stream_after(front, cut[0], args, kwargs)).detach().double()
        y = rows(batch, _stream_before(back, cut[1], args, kwargs)).double()
        if len(x) != len(y):
            raise PlanError(
                "the networks do not see the same places at their cuts",
                found=f"{len(x)} and {len(y)} rows",
                expected="as many tokens, or patches, in both",
            )
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        gram, cross = gram + x.T @ x, cross + x.T @ y
        energy = energy + torch.stack([y.square().sum(0), y.sum(0)])
    count = gram[-1, -1]
    eye = torch.eye(len(gram), dtype=torch.float64)
    eye[-1, -1] = 0.0
    damping = ridge * gram.diagonal()[:-1].mean() * eye
    found = torch.linalg.solve(gram + damping, cross)
    stitch = nn.Linear(len(gram) - 1, found.shape[1])
    with torch.no_grad():
        stitch.weight.copy_(found[:-1].T)
        stitch.bias.copy_(found[-1])
    rest = energy[0].sum() - 2 * (found * cross).sum() + (found * (gram @ found)).sum()
    variance = (energy[0] - energy[1].square() / count).sum()
    made = Stitched(
        _cut(front, cut[0], after=True), cut[0], _cut(back, cut[1], after=False), cut[1], stitch
    )
    made.error = float(rest / variance.clamp(min=1e-300))
    return made.eval()


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if hasattr(batch, "keys"):
        return (), dict(batch)
    return (batch, {}) if isinstance(batch, tuple) else ((batch,), {})


def _stream_after(
    module: nn.Module, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """What a block gives; nothing behind it is run."""
    seen: list[Tensor] = []

    def hook(_part: Any, _args: Any, out: Any) -> None:
        seen.append(stream_of(out))
        raise _Reached

    return _seen(
        module, module.get_submodule(block).register_forward_hook(hook), seen, args, kwargs
    )


def _stream_before(
    module: nn.Module, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """What a block takes."""
    seen: list[Tensor] = []

    def hook(_part: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(stream_of(given[0] if given else named["hidden_states"]))
        raise _Reached

    handle = module.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        return _seen(module, handle, seen, args, kwargs)


def _seen(
    module: nn.Module,
    handle: Any,
    seen: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    try:
        module(*args, **kwargs)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not seen:
        raise PlanError("the block at the cut is not run", network=type(module).__name__)
    return seen[0]


def _cut(module: nn.Module, block: str, *, after: bool) -> nn.Module:
    """A copy without the blocks behind ``block``, or before it: they are never run."""
    found = copy.deepcopy(module)
    parent, _, number = block.rpartition(".")
    stack = found.get_submodule(parent)
    if not isinstance(stack, nn.ModuleList | nn.Sequential) or not number.isdecimal():
        return found
    for k in range(len(stack)):
        if (k > int(number)) if after else (k < int(number)):
            stack[k] = _Pass(in_tuple=False)
    return found
