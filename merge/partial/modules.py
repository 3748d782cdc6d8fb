"""A module with other widths: the same code, tensors of other sizes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["resized_module"]


def resized_module(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``module`` with the tensors of ``state``, whatever their sizes.

    Layers of torch say their new sizes (``in_features``, ``num_features``, ``groups`` of a
    convolution by channel, ...). The module's own code must not rely on sizes that change, as
    ``view(-1, 512)`` does. PlanError unless names are the same and axes as many.
    """
    import torch

    found = copy.deepcopy(module)
    own = found.state_dict(keep_vars=True)
    odd = [n for n in {**own, **state} if n not in own or n not in state]
    odd += [n for n in own if n in state and own[n].ndim != state[n].ndim]
    if odd:
        name = odd[0]
        raise PlanError(
            "the tensors are not those of the module",
            network=type(module).__name__,
            tensor=name,
            found=list(state[name].shape) if name in state else "no such tensor",
            expected=list(own[name].shape) if name in own else "no such tensor",
        )
    made: dict[int, Any] = {}
    for name, old in own.items():
        path, _, last = name.rpartition(".")
        part = found.get_submodule(path)
        if id(old) not in made:
            value = state[name].detach().to(old.dtype).clone()
            wanted = old.requires_grad
            made[id(old)] = torch.nn.Parameter(value, wanted) if _is_parameter(old) else value
        setattr(part, last, made[id(old)])
    for part in found.modules():
        _resize(part)
    return found


def _is_parameter(value: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Parameter)


def _resize(part: Any) -> None:
    """What a layer says of its sizes, after its tensors."""
    from torch import nn

    weight = getattr(part, "weight", None)
    if weight is None:
        return
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = weight.shape
    elif isinstance(part, nn.modules.conv._ConvTransposeNd) and part.groups == 1:
        part.in_channels, part.out_channels = weight.shape[:2]
    elif isinstance(part, nn.modules.conv._ConvNd):
        if part.groups == part.in_channels > 1:
            part.groups = len(weight) * part.groups // part.out_channels
        part.out_channels, part.in_channels = len(weight), weight.shape[1] * part.groups
    elif isinstance(part, nn.modules.batchnorm._NormBase):
        part.num_features = len(weight)
    elif isinstance(part, nn.Embedding):
        part.num_embeddings, part.embedding_dim = weight.shape
    elif type(part).__name__ == "Conv1D":
        part.nx, part.nf = weight.shape
