"""The diagonal of the Fisher information: expected squares of gradients of single examples.

    F = mean over x of E_y (d log p(y | x) / d theta)^2,  y drawn from the network's own p(. | x)

The square of a batch's gradient is no estimate of it: gradients of examples cancel in the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError
from merge.statistics.examples import size_of, some_of
from merge.statistics.layers import masks_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gathered_fisher", "leaves_of"]

_CLASSES = 64
"""Up to so many classes the expectation is taken over all; else one label is drawn."""

Batch = tuple[Any, Any]


def gathered_fisher(
    leaves: Sequence[Tensor],
    output: Callable[[Any], object],
    batches: Sequence[Batch],
    criterion: Callable[[Any, Any], Tensor] | None,
    seed: int = 0,
    logits: Callable[[Any], Tensor] | None = None,
) -> list[Tensor]:
    """F of each of the tensors ``leaves``, which take gradients; zeros where none arrives.

    output: the network on inputs. criterion: from its output and the target to the mean loss, for
    labels that are in the data (the empirical Fisher information); None for the network's own.
    seed: of the labels that are drawn where there are many classes. logits: from the output to
    scores of classes, where that is not ``out`` or ``out.logits``.
    """
    import torch

    totals = [torch.zeros_like(leaf) for leaf in leaves]
    draw = torch.Generator().manual_seed(seed)
    count = 0
    with torch.enable_grad():
        for inputs, target in _single(batches):
            count += 1
            out = output(inputs)
            terms = (
                [(1.0, criterion(out, target))]
                if criterion is not None
                else _own_labels((logits or _logits)(out), inputs, draw)
            )
            for i, (weight, value) in enumerate(terms):
                if weight == 0.0:
                    continue
                slopes = torch.autograd.grad(
                    value, leaves, retain_graph=i + 1 < len(terms), allow_unused=True
                )
                for total, slope in zip(totals, slopes, strict=True):
                    if slope is not None:
                        total.addcmul_(slope, slope, value=weight)
    return [total.div_(max(1, count)) for total in totals]


def _single(batches: Sequence[Batch]) -> Iterator[Batch]:
    for inputs, target in batches:
        size = size_of(inputs)
        for i in range(size):
            same = hasattr(target, "ndim") and target.ndim and len(target) == size
            yield some_of(inputs, i, i + 1), target[i : i + 1] if same else target


def _own_labels(logits: Tensor, inputs: Any, draw: Any) -> list[tuple[float, Tensor]]:
    """Log-likelihoods of labels with their weights: of all classes, or of labels that are drawn."""
    import torch

    logs = torch.log_softmax(logits.double(), -1)
    if logs.ndim == 2 and logs.shape[-1] <= _CLASSES:
        shares = logs.detach().exp()[0]
        return [(float(p), logs[0, y]) for y, p in enumerate(shares)]
    flat = logs.reshape(-1, logs.shape[-1])
    labels = torch.multinomial(flat.detach().exp().cpu(), 1, generator=draw).to(flat.device)
    found = flat.gather(1, labels)[:, 0].reshape(logs.shape[:-1])
    for mask in masks_of(inputs):
        if mask.shape == found.shape:
            found = torch.where(mask.to(found.device), found, 0.0)
            break
    return [(1.0, found.sum())]


def _logits(out: Any) -> Tensor:
    import torch

    found = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if not isinstance(found, torch.Tensor) or found.ndim < 2:
        raise PlanError(
            "the network's output shows no distribution of labels",
            found=type(out).__name__,
            expected="logits, (examples, ..., classes)",
            do="gather with labels='data', which takes the task's loss and targets",
        )
    return found


def leaves_of(
    names: Sequence[str], tied: Mapping[str, Sequence[str]], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fresh tensors that take gradients for ``names``, and the state with them in their place.

    A tensor of several names is one tensor, so that its gradient is the sum over its uses.
    """
    leaves: dict[str, Tensor] = {}
    whole = dict(state)
    for name in names:
        if name in leaves:
            continue
        leaf = state[name].detach().clone().requires_grad_()
        for same in tied.get(name, [name]):
            leaves[same] = whole[same] = leaf
    return {n: leaves[n] for n in names}, whole
