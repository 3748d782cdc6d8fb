"""Running statistics of normalisation layers, measured anew on the data of all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge.learning.network import Job
from merge.statistics.norms import batch_norms, measuring

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["measured"]


def measured(
    jobs: Sequence[Job], buffers: Sequence[str], theta: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Means and variances of the merged model's BatchNorm layers, by merged name.

    The plain mean over all batches of all tasks, each weighing the same. Other buffers stay.
    """
    import torch

    names = [n for n in buffers if n.endswith(("running_mean", "running_var"))]
    sums = {n: torch.zeros_like(theta[n]) for n in names}
    counts = dict.fromkeys(names, 0)
    with torch.no_grad():
        for job in jobs:
            for number in range(len(job.learn)):
                inputs, _ = job.learn.batch(number)
                for name, value in _of_batch(job, theta, names, inputs).items():
                    sums[name] += value
                    counts[name] += 1
    return {n: sums[n] / counts[n] for n in names if counts[n]}


def _of_batch(
    job: Job, theta: Mapping[str, Tensor], names: Sequence[str], inputs: Any
) -> dict[str, Tensor]:
    """What one batch measures, with its layers in training mode and all others as they are used."""
    own = {n: theta[n].detach().clone() for n in names if n in job.places}
    layers = list(batch_norms(job.module).values())
    with measuring(layers, momentum=1.0):  # the statistics of this batch alone
        job.run({**theta, **own}, inputs, training=layers)
    return own
