"""What a network is for, as data: its code, batches of inputs with targets, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Measured", "Task"]

Batch = tuple[Any, Any]
"""Inputs (a tensor, a tuple or a mapping of arguments) and the target."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean loss over batches, and the share that was right where that can be told."""

    loss: float
    right: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A network's code with data: what is needed to run other weights in it and to judge them.

    module: its own weights are left as they are. criterion: from what the module returns and the
    target to the mean loss, such as ``torch.nn.functional.cross_entropy``. train: batches to match,
    learn and measure statistics on. test: batches to judge by. right: from output and target to the
    share that is right, or None. load: from a model's folder to the module's tensors; by default
    the tensors that lie there.

    Example::

        def digits():
            return merge.Task(Net(), F.cross_entropy, train=[(x, y)], test=[(x_test, y_test)])
    """

    module: nn.Module
    criterion: Callable[[Any, Any], Tensor]
    train: Sequence[Batch]
    test: Sequence[Batch] = ()
    right: Callable[[Any, Any], float] | None = None
    load: Callable[[Any], Mapping[str, Tensor]] | None = None

    def output(self, state: Mapping[str, Tensor], inputs: Any) -> Any:
        """What the module returns with the tensors of ``state``."""
        import torch

        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        args = inputs if isinstance(inputs, tuple) else () if kwargs else (inputs,)
        return torch.func.functional_call(self.module, dict(state), args, kwargs)

    def loss(self, state: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The mean loss of a batch, which can be differentiated."""
        return self.criterion(self.output(state, batch[0]), batch[1])

    def inputs(self) -> list[Any]:
        """The inputs of the training batches."""
        return [inputs for inputs, _ in self.train]

    def measure(self, state: Mapping[str, Tensor], batches: Sequence[Batch]) -> Measured:
        """Loss and share right, the mean over the batches."""
        import torch

        if not batches:
            raise PlanError(
                "there is no data to judge by",
                found="no batches",
                expected="at least one batch of inputs and targets",
            )
        losses, shares = [], []
        with torch.no_grad():
            for inputs, target in batches:
                out = self.output(state, inputs)
                losses.append(float(self.criterion(out, target)))
                if self.right is not None:
                    shares.append(self.right(out, target))
        share = sum(shares) / len(shares) if shares else None
        return Measured(sum(losses) / len(losses), share)

    def fits(self, state: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
        """The tensors of ``state`` that the module has, floats in float32; PlanError unless all."""
        wanted = {n: tuple(t.shape) for n, t in self.module.state_dict().items()}
        found = {n: tuple(t.shape) for n, t in state.items()}
        odd = [n for n in {**wanted, **found} if wanted.get(n) != found.get(n)]
        if odd:
            name = odd[0]
            raise PlanError(
                "a model's tensors are not those of the task's module",
                model=label,
                tensor=name,
                found=f"shape {found[name]}" if name in found else "no such tensor",
                expected=f"shape {wanted[name]}" if name in wanted else "no such tensor",
                do="check that the data's module is this model's architecture",
            )
        floats = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
        return {n: floats[n] for n in wanted}
