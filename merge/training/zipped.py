"""Networks zipped up to a cut: one front for all, and behind it the rest of each of them.

What the front gives at the cut are the zipped units; each network's rest takes for each of its
units the one that it became (ZipIt!; Stoica et al. 2023, arXiv:2305.03053, section 4.3).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OUTPUTS", "ZippedNetwork", "reached"]

OUTPUTS = ("each", "mean", "cat")
"""What a zipped network returns: a tuple of what each rest gives, its mean, or the classes of all
one after the other."""


class _Reached(Exception):
    """No error: a network has run as far as it should."""


class ZippedNetwork(nn.Module):
    """Runs ``front`` as far as the module ``cut``, then the rest of each network behind it.

    index: (models, units), the zipped unit that each network's unit became. channel: on which axis
    of what the cut gives they are. outputs: what is returned, ``each``, ``mean`` or ``cat``. apart:
    whether the networks' code could be cut in two; else each rest runs all of its network, and what
    it has at the cut is replaced.
    """

    def __init__(
        self,
        front: nn.Module,
        networks: Sequence[nn.Module],
        cut: str,
        index: Tensor,
        channel: int,
        outputs: str = "each",
    ) -> None:
        super().__init__()
        if outputs not in OUTPUTS:
            raise PlanError(
                "that is nothing a zipped network can return",
                found=outputs,
                expected=f"one of {', '.join(OUTPUTS)}",
            )
        self.cut, self.channel, self.outputs = cut, channel, outputs
        parts = [_parts(m, cut) for m in (front, *networks)]
        self.apart = all(p is not None for p in parts)
        first, rests = front, list(networks)
        if self.apart:
            first = parts[0][0]  # type: ignore[index]
            rests = [p[1] for p in parts[1:] if p is not None]
        self.front = copy.deepcopy(first)
        self.rests = nn.ModuleList(copy.deepcopy(m) for m in rests)
        self.index: Tensor
        self.register_buffer("index", index)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        zipped = (
            self.front(*args, **kwargs)
            if self.apart
            else reached(self.front, self.cut, args, kwargs)
        )
        found = []
        for k, rest in enumerate(self.rests):
            own = _replaced(zipped, self.channel, self.index[k])
            found.append(
                rest(own, *args, **kwargs) if self.apart else self._behind(rest, own, args, kwargs)
            )
        if self.outputs == "each":
            return tuple(found)
        scores = [getattr(out, "logits", out) for out in found]
        return torch.cat(scores, -1) if self.outputs == "cat" else torch.stack(scores).mean(0)

    def _behind(
        self, module: nn.Module, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        handle = module.get_submodule(self.cut).register_forward_hook(lambda *_: given)
        try:
            return module(*args, **kwargs)
        finally:
            handle.remove()


def _replaced(value: Any, channel: int, index: Tensor) -> Any:
    """What the cut gives, with the units of one network. Of a tuple the first is meant."""
    if isinstance(value, tuple):
        return (_replaced(value[0], channel, index), *value[1:])
    return value.index_select(channel, index)


def reached(module: nn.Module, cut: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the module named ``cut`` gives the first time; nothing behind it is run."""
    seen: list[Any] = []

    def hook(_part: Any, _args: Any, out: Any) -> None:
        seen.append(out)
        raise _Reached

    handle = module.get_submodule(cut).register_forward_hook(hook)
    try:
        module(*args, **kwargs)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not seen:
        raise PlanError("the module at the cut is not run", network=type(module).__name__, at=cut)
    return seen[0]


class _Tracer(fx.Tracer):
    """Takes the module at the cut as a whole."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self._cut = cut

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == self._cut or super().is_leaf_module(
            m, module_qualified_name
        )


def _parts(module: nn.Module, cut: str) -> tuple[nn.Module, nn.Module] | None:
    """The module as far as the cut, and the rest, which takes what the cut gives first.

    None where its code cannot be traced, or runs the cut several times.
    """
    try:
        graph = _Tracer(cut).trace(module)
    except Exception:  # code that branches on its values may raise anything under the tracer
        return None
    nodes = [n for n in graph.nodes if n.op == "call_module" and n.target == cut]
    if len(nodes) != 1:
        return None
    front = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        known[node] = front.node_copy(node, lambda n: known[n])
        if node is nodes[0]:
            break
    front.output(known[nodes[0]])
    rest = fx.Graph()
    given = rest.placeholder("zipped")
    known = {nodes[0]: given}
    for node in graph.nodes:
        if node is nodes[0]:
            continue
        known[node] = rest.node_copy(node, lambda n: known[n])
    return _module_of(module, front), _module_of(module, rest)


def _module_of(module: nn.Module, graph: fx.Graph) -> nn.Module:
    """The graph with those of the module's parts that it uses."""
    found = fx.GraphModule(module, graph)
    found.graph.eliminate_dead_code()
    found.delete_all_unused_submodules()
    found.recompile()
    return found
