"""A block left out, and the last map before it changed so that the network misses it least.

Closed form: the last linear map of the block before gets, by least squares on data, the output that
the stream would have had after the block that goes. In a pre-norm network that is its own output
plus what that block added; where a norm follows the addition, the input of that block's last norm
less what else is added, and that norm's weights move down with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError
from merge.resize.influence import stream_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Folded", "folded"]


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """What changes when a block is left out.

    linear: the module that is fitted anew, its weight in the module's own layout, and its bias.
    norm: the modules (of the block before, of the one that goes) whose weights are handed down.
    error: what remains of the difference, as a share of what the block did to the stream.
    """

    linear: str
    weight: Tensor
    bias: Tensor | None
    norm: tuple[str, str] | None
    error: float


@dataclass(slots=True)
class _Seen:
    """What passes in one run of the network."""

    inputs: Tensor | None = None
    output: Tensor | None = None
    entered: Tensor | None = None
    left: Tensor | None = None
    norms: dict[str, tuple[Tensor, Tensor]] | None = None


def folded(
    module: nn.Module,
    before: str,
    gone: str,
    run: Callable[[Any], object],
    batches: Sequence[Any],
    rows: Callable[[Any, Tensor], Tensor],
    ridge: float = 1e-4,
) -> Folded:
    """The last linear map of block ``before`` for a network without block ``gone``.

    run: the network on a batch. rows: from a batch and a hidden state to the rows that count, such
    as those of tokens that are not padding. One pass over the data; in memory are normal equations
    of the layer's inputs. PlanError where a block has no linear map whose output is its last word.
    """
    import torch

    linear = _last_linear(module, before, run, batches[0])
    norms = _last_norms(module, (before, gone), run, batches[0])
    gram: Any = 0.0
    cross: Any = 0.0
    energy = count = 0.0
    part = dict(module.named_modules())[linear]
    weight = _as_rows(part, part.weight.detach()).double()
    has_bias = getattr(part, "bias", None) is not None
    for batch in batches:
        seen = _watch(module, linear, (before, gone), norms, run, batch)
        z, wanted, base = _targets(seen, norms, batch, rows)
        ones = torch.ones(len(z), 1, dtype=torch.float64)
        z = torch.cat([z, ones], 1) if has_bias else z
        gram = gram + z.T @ z
        cross = cross + z.T @ wanted
        energy += float((wanted - base).square().sum())
        count += len(z)
    own = weight if not has_bias else torch.cat([weight, part.bias.detach().double()[:, None]], 1)
    damping = ridge * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=torch.float64) * damping
    change = torch.linalg.solve(gram + eye, cross - gram @ own.T).T
    fitted = own + change
    rest = float((change @ gram * change).sum() - 2 * (change * (cross.T - own @ gram)).sum())
    new = fitted[:, : weight.shape[1]]
    return Folded(
        linear,
        _as_rows(part, new),
        fitted[:, -1] if has_bias else None,
        norms,
        max(0.0, (energy + rest) / max(energy, 1e-300)),
    )


def _targets(
    seen: _Seen,
    norms: tuple[str, str] | None,
    batch: Any,
    rows: Callable[[Any, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, what the map's output should be, and what it is, as rows in float64."""
    assert seen.inputs is not None and seen.output is not None
    if norms is None:
        assert seen.entered is not None and seen.left is not None
        wanted = seen.output + (seen.left - seen.entered)
    else:
        assert seen.norms is not None
        beside = seen.norms[norms[0]][0] - seen.output
        wanted = seen.norms[norms[1]][0] - beside
    return (
        rows(batch, seen.inputs).double(),
        rows(batch, wanted).double(),
        rows(batch, seen.output).double(),
    )


def _watch(
    module: nn.Module,
    linear: str,
    blocks: tuple[str, str],
    norms: tuple[str, str] | None,
    run: Callable[[Any], object],
    batch: Any,
) -> _Seen:
    import torch

    seen = _Seen(norms={})
    parts = dict(module.named_modules())

    def see_linear(_part: Any, args: Any, out: Any) -> None:
        seen.inputs, seen.output = args[0].detach(), out.detach()

    def see_block(_part: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.entered, seen.left = stream_of(given).detach(), stream_of(out).detach()

    def see_norm(name: str) -> Any:
        def hook(_part: Any, args: Any, out: Any) -> None:
            assert seen.norms is not None
            seen.norms[name] = args[0].detach(), out.detach()

        return hook

    handles = [parts[linear].register_forward_hook(see_linear)]
    handles.append(parts[blocks[1]].register_forward_hook(see_block, with_kwargs=True))
    handles += [parts[n].register_forward_hook(see_norm(n)) for n in norms or ()]
    try:
        with torch.no_grad():
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _last_linear(module: nn.Module, block: str, run: Callable[[Any], object], batch: Any) -> str:
    """The linear map of a block that is called last."""
    return _called(module, block, run, batch, _is_linear)[-1][0]


def _last_norms(
    module: nn.Module, blocks: tuple[str, str], run: Callable[[Any], object], batch: Any
) -> tuple[str, str] | None:
    """The norms that give what the blocks give; None where blocks end with an addition."""
    import torch

    found = []
    for block in blocks:
        called = _called(module, block, run, batch, _is_norm, needed=False)
        ends = [n for n, out, last in called if last is not None and torch.equal(out, last)]
        found.append(ends[-1] if ends else None)
    if found[0] is None or found[1] is None:
        return None
    return found[0], found[1]


def _called(
    module: nn.Module,
    block: str,
    run: Callable[[Any], object],
    batch: Any,
    kind: Callable[[Any], bool],
    needed: bool = True,
) -> list[tuple[str, Tensor, Tensor | None]]:
    """Parts of a block in the order of their calls, with their outputs and the block's."""
    import torch

    calls: list[tuple[str, Tensor]] = []
    ends: list[Tensor] = []
    handles = []
    for name, part in module.named_modules():
        if name.startswith(f"{block}.") and kind(part):
            handles.append(
                part.register_forward_hook(
                    lambda _p, _a, out, name=name: calls.append((name, out.detach()))
                )
            )
    whole = dict(module.named_modules())[block]
    handles.append(
        whole.register_forward_hook(lambda _p, _a, out: ends.append(stream_of(out).detach()))
    )
    try:
        with torch.no_grad():
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    if needed and not calls:
        raise PlanError(
            "a block has no linear map that could make up for another block",
            block=block,
            expected="a torch.nn.Linear that is called when the network runs",
            do="leave blocks out without least squares",
        )
    return [(name, out, ends[-1] if ends else None) for name, out in calls]


def _is_linear(part: Any) -> bool:
    from torch import nn

    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def _is_norm(part: Any) -> bool:
    return type(part).__name__.endswith("Norm")


def _as_rows(part: Any, weight: Tensor) -> Tensor:
    """A weight as (out, in), and back: GPT-2 stores its transpose."""
    return weight.T if type(part).__name__ == "Conv1D" else weight
