"""How much each block of a network matters: what changes when it is passed by.

The influence of a block is 1 - cos between what the network gives with it and without it (the
macro influence of FuseGPT; Pei et al. 2024, arXiv:2411.14507). Blocks go one at a time, the least
influential first, each time measured anew among those that are left (BlockPruner; Zhong et al.
2024, arXiv:2406.10594).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["least_influential", "passed_by", "stream_of"]


def stream_of(value: Any) -> Tensor:
    """The hidden state in what a block takes or gives: a tensor, or the first of a tuple."""
    from torch import Tensor

    found = value
    while isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise PlanError(
            "a block does not pass a tensor on", found=type(value).__name__, expected="a tensor"
        )
    return found


@contextmanager
def passed_by(module: nn.Module, blocks: Collection[str]) -> Iterator[None]:
    """While entered, the named blocks of ``module`` give back what they were given."""
    parts = dict(module.named_modules())

    def hook(_part: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    with ExitStack() as stack:
        for name in blocks:
            handle = parts[name].register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def least_influential(
    module: nn.Module,
    blocks: Sequence[str],
    count: int,
    run: Callable[[Any], Tensor],
    batches: Sequence[Any],
    progress: Callable[[str, float], None] | None = None,
) -> list[tuple[str, float]]:
    """The ``count`` blocks to leave out, in the order in which they go, with their influences.

    run: what the network gives on a batch, as a tensor whose last axis is compared. Each removal
    runs the data once for every block that is left. progress: called with each block that goes.
    """
    import torch

    if not 0 <= count < len(blocks):
        raise PlanError(
            "not that many blocks can be left out",
            found=count,
            expected=f"0 to {len(blocks) - 1} of {len(blocks)}",
        )
    with torch.no_grad():
        whole = [run(batch) for batch in batches]
    gone: list[tuple[str, float]] = []
    while len(gone) < count:
        left = [b for b in blocks if b not in {name for name, _ in gone}]
        scores = {b: _influence(module, [*(n for n, _ in gone), b], run, batches, whole)
                  for b in left}  # fmt: skip
        least = min(left, key=lambda b: (scores[b], left.index(b)))
        gone.append((least, scores[least]))
        if progress is not None:
            progress(least, scores[least])
    return gone


def _influence(
    module: nn.Module,
    blocks: Collection[str],
    run: Callable[[Any], Tensor],
    batches: Sequence[Any],
    whole: Sequence[Tensor],
) -> float:
    import torch

    total, seen = 0.0, 0
    with torch.no_grad(), passed_by(module, blocks):
        for batch, wanted in zip(batches, whole, strict=True):
            found = run(batch)
            cosine = torch.nn.functional.cosine_similarity(found.double(), wanted.double(), dim=-1)
            total += float((1.0 - cosine).sum())
            seen += cosine.numel()
    return total / max(1, seen)
