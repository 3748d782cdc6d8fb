"""A twin in float64: all of its weights random and of a size at which errors show."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["double_precision", "twin_of"]


class double_precision(TorchFunctionMode):  # noqa: N801  (used like a function)
    """A context in which casts of float64 tensors to float32 do nothing.

    Models cast to float32 in norms and in softmax. An exact symmetry would show up to 2e-7 there.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype is torch.float64:
            if func is Tensor.float:
                return first
            args = [torch.float64 if a is torch.float32 else a for a in args]
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def twin_of(module: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """A copy in float64 and evaluation mode whose weights are random.

    Maps keep the size of what goes through them, times ``scale``; gains and variances are near 1,
    biases, means and all else around 0.3. Weights of the usual initial size of 0.02 would hide
    errors, since no branch would count beside the residual stream; zeros would hide them all.
    """
    twin = copy.deepcopy(module).double().eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*twin.named_parameters(), *_saved_buffers(twin)]:
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=draw, dtype=torch.float64)
            last = name.rpartition(".")[2]
            if last == "running_var":
                value.copy_(1 + 0.3 * noise.abs())
            elif value.ndim == 1 and ("weight" in last or "gain" in last or "scale" in last):
                value.copy_(1 + 0.3 * noise)
            elif value.ndim < 2:
                value.copy_(0.3 * noise)
            else:
                fan = value[0].numel() if value.ndim > 3 else value.shape[-1]
                value.copy_(scale * max(0.1, 1.2 / fan**0.5) * noise)
    return twin


def _saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    saved = module.state_dict(keep_vars=True)
    return [(n, b) for n, b in module.named_buffers() if n in saved]
