"""A classifier of an encoder's features: the mean of each class's examples, under the base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import SourceError
from merge.streams.batches import Batches
from merge.streams.models import Runner

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["put_prototypes"]

_SCALE = 20.0
"""Of cosines, so that the softmax of a right answer is not flat."""


def put_prototypes(runner: Runner, train: Batches) -> None:
    """Make the runner's module return scores of classes: 20 times cosines to the prototypes.

    The prototype of a class is the mean of the features of its training examples, minus the mean
    over classes, at length 1. Features are pooled as 1_Pooling/config.json says, else the mean
    over tokens, at length 1. The module's tensors and their names stay as they are.
    """
    import torch

    features = _Features(_pools_first(runner))
    runner.module.register_forward_hook(features, with_kwargs=True)
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
    features.prototypes = normal(means - means.mean(0), dim=-1)


@dataclass(slots=True, eq=False)
class _Features:
    """A hook that turns an encoder's output to features, or to scores once there are prototypes."""

    first: bool
    prototypes: Tensor | None = None

    def __call__(
        self, _module: nn.Module, _args: Sequence[Any], given: Mapping[str, Any], out: Any
    ) -> Tensor:
        import torch

        hidden = out[0]
        if hidden.ndim == 4:  # of convolutions: channels, then places
            hidden = hidden.flatten(2).transpose(1, 2)
        if self.first:
            pooled = hidden[:, 0]
        else:
            mask = given.get("attention_mask")
            mask = torch.ones(hidden.shape[:2]) if mask is None else mask
            weight = mask.to(hidden.dtype)[..., None]
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        found = torch.nn.functional.normalize(pooled, dim=-1)
        return found if self.prototypes is None else _SCALE * found @ self.prototypes.T


def _pools_first(runner: Runner) -> bool:
    """Whether the first token stands for the whole."""
    file = None if runner.folder is None else runner.folder / "1_Pooling" / "config.json"
    if file is None or not file.is_file():
        return False
    try:
        return bool(json.loads(file.read_text()).get("pooling_mode_cls_token", False))
    except (ValueError, AttributeError):
        raise SourceError("the file is no JSON object", file=file) from None
