"""A classifier of an encoder's features: the mean of each class's examples, under the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.errors import SourceError
from merge.streams.batches import Batches
from merge.streams.features import put_features
from merge.streams.models import Runner

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["put_prototypes"]

_SCALE = 20.0
"""Of cosines, so that the softmax of a right answer is not flat."""


def put_prototypes(runner: Runner, train: Batches) -> None:
    """Make the runner's module return scores of classes: 20 times cosines to the prototypes.

    The prototype of a class is the mean of the features of its training examples, minus the mean
    over classes, at length 1. The module's tensors and their names stay as they are.
    """
    import torch

    put_features(runner)
    sums: dict[int, Tensor] = {}
    with torch.no_grad():
        for inputs, target in train:
            found = runner.module(**inputs)
            for row, label in zip(found, target.tolist(), strict=True):
                sums[label] = sums.get(label, torch.zeros_like(row)) + row
    if not sums:
        raise SourceError("there is no training data to make prototypes of")
    absent = [i for i in range(max(sums) + 1) if i not in sums]
    if absent:
        raise SourceError(
            "a class has no training data to make its prototype of", found=f"class {absent[0]}"
        )
    normal = torch.nn.functional.normalize
    means = torch.stack([normal(sums[i], dim=0) for i in sorted(sums)])
    prototypes = normal(means - means.mean(0), dim=-1)
    runner.module.register_forward_hook(lambda _m, _i, out: _SCALE * out @ prototypes.T)
