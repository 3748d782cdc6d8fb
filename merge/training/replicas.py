"""Replicas that are trained apart and merged from time to time, as Model Stock does it.

Every replica goes on from the merge, with the optimiser's moments and the learning rate that it
had (Jang et al. 2024, arXiv:2403.19522, periodic merging). The anchor is the pre-trained network
all along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge import methods
from merge.checkpoint.memory import open_state_dict
from merge.errors import PlanError
from merge.ir.merging import merge_checkpoints
from merge.training.callback import Every

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PeriodicMerge"]


class PeriodicMerge(Every):
    """Merges replicas after every so many epochs or steps, in place.

    replicas: networks trained in lockstep in this process. Without them it is the processes of
    torch.distributed, each with a network of its own (not wrapped in DistributedDataParallel):
    tensors are gathered one at a time. anchor: the pre-trained tensors, for methods that need a
    base. method, parameters: of the registry. Only floats are merged; counters stay.

    Example::

        merging = merge.PeriodicMerge(anchor=start, replicas=models)
        for epoch in range(1, 11):
            for model, optimizer, loader in runs:
                train(model, optimizer, loader)
            merging.epoch(models[0], epoch)
    """

    def __init__(
        self,
        *,
        anchor: Mapping[str, Tensor] | None = None,
        replicas: Sequence[nn.Module] = (),
        every: int = 1,
        on: str = "epoch",
        start: int = 1,
        method: str = "model_stock",
        **parameters: object,
    ) -> None:
        super().__init__(every, on, start)
        self.anchor, self.replicas = anchor, tuple(replicas)
        self.method, self.parameters = methods.get(method), parameters
        if self.method.base in ("required", "first operand") and anchor is None:
            raise PlanError(
                f"method {method!r} needs the anchor",
                expected="anchor=, the tensors that the replicas began with",
            )

    def act(self, module: nn.Module) -> None:
        """Merge the replicas now; ``module`` is that of this process, where they are processes."""
        import torch

        if self.replicas:
            states = [_floats(m) for m in self.replicas]
            merged = self._merged(states)
            with torch.no_grad():
                for state in states:
                    for name, value in state.items():
                        value.copy_(merged[name])
            return
        from torch import distributed

        if not distributed.is_available() or not distributed.is_initialized():
            raise PlanError(
                "there are no replicas to merge",
                expected="replicas=, or processes of torch.distributed",
            )
        with torch.no_grad():
            for name, own in _floats(module).items():
                every = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
                distributed.all_gather(every, own.contiguous())
                own.copy_(self._merged([{name: t} for t in every])[name])

    def _merged(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        opened = [open_state_dict(s, f"replica {k}") for k, s in enumerate(states)]
        root = None
        if self.anchor is not None and self.method.base != "donor":
            lacking = [n for n in states[0] if n not in self.anchor]
            if lacking:
                raise PlanError(
                    "the anchor lacks a tensor of the replicas",
                    tensor=lacking[0],
                    found=f"{len(lacking)} are missing",
                )
            root = open_state_dict({n: self.anchor[n] for n in states[0]}, "anchor")
        operands = opened
        if self.method.base == "first operand" and root is not None:
            operands = [root, *opened]
        bound = self.method.bind(len(operands), self.parameters)
        return merge_checkpoints(self.method, operands, root, lambda _: bound).state_dict()


def _floats(module: Any) -> dict[str, Tensor]:
    """The network's own tensors of floats, each once."""
    seen: dict[int, str] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and seen.setdefault(id(tensor), name) == name:
            out[name] = tensor.detach()
    return out
