"""An encoder's output as one vector for each input: what its texts or pictures mean to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge.errors import SourceError
from merge.streams.models import Runner

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Features", "put_features"]


class Features:
    """A hook that turns an encoder's output to features: pooled over places, at length 1."""

    def __init__(self, first: bool) -> None:
        self.first = first

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
        return torch.nn.functional.normalize(pooled, dim=-1)


def put_features(runner: Runner) -> None:
    """Make the runner's module return features.

    Pooled as 1_Pooling/config.json says, else by the mean over tokens. Its tensors and their names
    stay as they are.
    """
    runner.module.register_forward_hook(Features(_pools_first(runner)), with_kwargs=True)


def _pools_first(runner: Runner) -> bool:
    """Whether the first token stands for the whole."""
    file = None if runner.folder is None else runner.folder / "1_Pooling" / "config.json"
    if file is None or not file.is_file():
        return False
    try:
        return bool(json.loads(file.read_text()).get("pooling_mode_cls_token", False))
    except (ValueError, AttributeError):
        raise SourceError("the file is no JSON object", file=file) from None
