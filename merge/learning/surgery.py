"""Representation surgery (Yang et al. 2024, arXiv:2402.02705): a small correction for each task.

    z' = z - U relu(D z),    D (rank, width), U (width, rank)

behind a layer of the merged model, whose tensors stay as they are. U starts at zero, and so the
corrected model as the merge itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge.errors import MergeError, PlanError
from merge.learning.batches import key_of
from merge.learning.network import Job

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DOWN", "UP", "corrected", "correcting", "with_bottlenecks"]

DOWN = "surgery.down"
UP = "surgery.up"
"""Names of a correction's tensors among those that are learned for a task."""


def with_bottlenecks(
    jobs: Sequence[Job], layer: str, rank: int, theta: Mapping[str, Tensor], seed: int
) -> list[Job]:
    """The tasks with a correction behind ``layer`` that is theirs alone.

    theta: tensors to run each module with once, to see how wide the layer's output is.
    """
    import torch

    out = []
    for job in jobs:
        inputs, target = job.learn.batch(0)
        try:
            with torch.no_grad():
                seen = first(job.view(theta, inputs, target, layer=layer).features)
        except MergeError as error:
            raise error.at(key="surgery") from None
        if not isinstance(seen, torch.Tensor) or not seen.is_floating_point():
            raise PlanError(
                "a layer's output cannot be corrected: it is no tensor of floats",
                task=job.name,
                layer=layer,
                found=type(seen).__name__,
            )
        width = seen.shape[-1]
        draw = torch.Generator().manual_seed(key_of(seed, "surgery", job.name))
        down = torch.randn(rank, width, generator=draw).to(seen) / width**0.5
        free = {DOWN: down, UP: torch.zeros_like(down.T).contiguous()}
        own = {n: t.requires_grad_(True) for n, t in free.items()}
        out.append(replace(job, free={**job.free, **own}, layer=layer))
    return out


def first(found: Any) -> Any:
    """A layer's output, or the first of several."""
    return found[0] if isinstance(found, tuple | list) else found


def corrected(found: Any, down: Tensor, up: Tensor) -> Any:
    """A layer's output with the correction; what comes beside it stays."""
    import torch

    if isinstance(found, tuple):
        return (corrected(found[0], down, up), *found[1:])
    value: Tensor = found - torch.relu(found @ down.T) @ up.T
    return value


@contextmanager
def correcting(module: nn.Module, layer: str, down: Tensor, up: Tensor) -> Iterator[None]:
    """The module with the correction in place."""
    inside = dict(module.named_modules())[layer]
    handle = inside.register_forward_hook(lambda _m, _i, out: corrected(out, down, up))
    try:
        yield
    finally:
        handle.remove()
