"""What a network is for, as data: its code, batches of inputs with targets, and a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import MergeError, PlanError, ScoreError, told
from merge.ir.align import is_rebuilt
from merge.statistics.runs import evaluating

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Measured", "Task"]

Batch = tuple[Any, Any]
"""Inputs (a tensor, a tuple or a mapping of arguments) and the target."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean loss over the samples, and the share that was right where that can be told."""

    loss: float
    right: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A network's code with data: what is needed to run other weights in it and to judge them.

    module: its own weights are left as they are. criterion: from what the module returns and the
    target to the mean loss, such as ``torch.nn.functional.cross_entropy``. train: batches to match,
    learn and measure statistics on. test: batches to judge by. right: from output and target to the
    share that is right, or None. load: from a model's folder to the module's tensors; by default
    the tensors that lie there. count: how many samples a batch's mean loss is the mean of; by
    default as many as its target has rows, or else its inputs.

    What learning asks for besides (`merge.learn`): name, under which errors and tables speak of the
    task. adapt: batches to learn on that need no target, as (inputs, None), or inputs alone that
    are no tuple; ``train`` where there are none. validate: batches that candidates are scored on,
    disjoint from those; labelled or not. place: where a merged tensor lies in the module: a prefix
    of its name, a mapping, or a function of the name; None is found by itself. head: names in the
    module, or beginnings of them, of what is the task's own and is not merged. logits: from what
    the module returns to scores of classes, (rows, classes); ``out`` or ``out.logits`` by default.
    classes: how many there are, where that cannot be read off the logits. weight: of its loss.

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
    count: Callable[[Batch], float] | None = None
    name: str = ""
    adapt: Iterable[Any] = ()
    validate: Iterable[Any] = ()
    place: str | Mapping[str, str] | Callable[[str], str | None] | None = None
    head: Sequence[str] = ()
    logits: Callable[[Any], Tensor] | None = None
    classes: int | None = None
    weight: float = 1.0

    @property
    def has_labels(self) -> bool:
        """Whether whole numbers as targets are classes, as far as that can be told."""
        import torch

        return self.right is None or self.criterion is torch.nn.functional.cross_entropy

    def output(self, state: Mapping[str, Tensor], inputs: Any) -> Any:
        """What the module returns with the tensors of ``state``, in evaluation mode."""
        import torch

        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        args = inputs if isinstance(inputs, tuple) else () if kwargs else (inputs,)
        # Tied tensors come under each of their names, as points of a line two tensors by then.
        with evaluating(self.module):
            return torch.func.functional_call(
                self.module, dict(state), args, kwargs, tie_weights=False
            )

    def loss(self, state: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The mean loss of a batch, which can be differentiated.

        PlanError for what the network or the criterion raises, ScoreError unless it is finite.
        """
        return self._judged(state, batch)[1]

    def _judged(self, state: Mapping[str, Tensor], batch: Batch) -> tuple[Any, Tensor]:
        """Output and loss of a batch."""
        import torch

        inputs, target = batch
        out = None
        try:
            out = self.output(state, inputs)
            loss = self.criterion(out, target)
        except MergeError:
            raise
        except Exception as error:  # the network's own code may raise anything
            _check_labels(out, target)
            raise PlanError(
                "the network cannot be run on the data",
                found=told(error),
                do="check that shapes, types and labels are those that the network takes",
            ) from error
        if not bool(torch.isfinite(loss.detach())):
            raise ScoreError(
                "the loss is not a finite number",
                found=loss.detach().item(),
                do="look for NaN or overflow in the data and in both models",
            )
        return out, loss

    def inputs(self) -> list[Any]:
        """The inputs of the training batches."""
        return [inputs for inputs, _ in self.train]

    def measure(self, state: Mapping[str, Tensor], batches: Sequence[Batch]) -> Measured:
        """Loss and share right: means over the samples, of which the last batch may have few."""
        import torch

        if not batches:
            raise PlanError(
                "there is no data to judge by",
                found="no batches",
                expected="at least one batch of inputs and targets",
            )
        counts, losses, shares = [], [], []
        with torch.no_grad():
            for batch in batches:  # once: a batch may be made anew each time it is asked for
                out, loss = self._judged(state, batch)
                counts.append(self.samples(batch))
                losses.append(float(loss))
                if self.right is not None:
                    shares.append(self.right(out, batch[1]))
        weights = _shares(counts)
        return Measured(_sum(weights, losses), _sum(weights, shares) if shares else None)

    def samples(self, batch: Batch) -> float:
        """How many samples are in a batch."""
        return float(_rows(batch)) if self.count is None else self.count(batch)

    def weights(self, batches: Sequence[Batch]) -> list[float]:
        """How much each batch weighs in a mean over all samples; together 1."""
        return _shares([self.samples(b) for b in batches])

    def fits(self, state: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
        """The tensors of ``state`` that the module has, floats in float32; PlanError unless all.

        Constants that models rebuild (`is_rebuilt`) may be missing here or there: they are the
        module's own then.
        """
        own = self.module.state_dict()
        wanted = {n: tuple(t.shape) for n, t in own.items()}
        constants = {n: t for n, t in own.items() if n not in state and is_rebuilt(n, t.shape)}
        known = {n: t for n, t in state.items() if n in own or not is_rebuilt(n, t.shape)}
        state = {**constants, **known}
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


def _shares(counts: Sequence[float]) -> list[float]:
    total = math.fsum(counts)
    return [c / total for c in counts] if total else [1 / len(counts)] * len(counts)


def _sum(weights: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(w * x for w, x in zip(weights, values, strict=True))


def _rows(batch: Batch) -> int:
    """Samples in a batch, as the first axis of its target or of its inputs has them."""
    inputs, target = batch
    several = inputs.values() if isinstance(inputs, Mapping) else inputs
    parts = [target, *(several if isinstance(inputs, Mapping | tuple) else [inputs])]
    shapes: Iterator[Sequence[int]] = (getattr(part, "shape", ()) for part in parts)
    return next((int(shape[0]) for shape in shapes if len(shape)), 1)


def _check_labels(out: Any, target: Any) -> None:
    """PlanError where a target names a class beyond those that the network tells apart."""
    found = getattr(out, "logits", out)
    shape: Sequence[int] = getattr(found, "shape", ())
    whole = hasattr(target, "is_floating_point") and not target.is_floating_point()
    if len(shape) < 2 or not whole or not target.numel() or target.ndim != len(shape) - 1:
        return
    highest, lowest = int(target.max()), int(target.min())
    if highest >= shape[1] or lowest < 0:
        raise PlanError(
            "a label is out of range",
            found=f"label {highest if highest >= shape[1] else lowest}",
            expected=f"0 to {shape[1] - 1}: the network tells {shape[1]} classes apart",
            do="number the classes from 0, as the network was trained to tell them apart",
        )
