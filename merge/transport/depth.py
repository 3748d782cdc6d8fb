"""Which layers of two networks of different depths are alike: costs, and the best map in order.

Cross-layer alignment (CLAFusion; Nguyen et al. 2023, arXiv:2110.15538): every layer of the
shallower network gets one of the deeper, later ones later ones, at the least total cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from merge.alignment.moments import Moments
from merge.errors import PlanError
from merge.statistics.runs import run
from merge.transport.plans import exact

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

__all__ = ["DEPTHS", "align_layers", "answers_of", "debiased_cka", "layer_costs", "size_costs"]

DEPTHS = ("count", "cka", "wasserstein")
"""What layers are compared by: their numbers of units and where they stand, the similarity of what
they answer (1 - CKA), what it costs to transport their units."""

_SAMPLES = 1024
"""Rows of activations by which layers are compared at most."""

_PLACE = 0.01
"""What it costs, in `size_costs`, to be as far apart as the first and the last layer."""


def align_layers(cost: NDArray[Any], *, first: bool = False, last: bool = False) -> list[int]:
    """For each row of ``cost`` (n, m), n <= m, its column: increasing, of least sum.

    F[k, l] = min(F[k, l - 1], F[k - 1, l - 1] + cost[k, l]), traced back; O(n m). first: the first
    row gets the first column. last: the last row gets the last, if it is not the first as well.

    >>> import numpy as np
    >>> align_layers(np.array([[0, 5, 5, 5], [5, 5, 0, 5]]))
    [0, 2]
    """
    import numpy as np

    n, m = cost.shape
    if n > m:
        raise PlanError(
            "layers are aligned from the shallower network to the deeper",
            found=f"{n} layers to {m}",
            expected="at most as many as there are",
        )
    if first:
        return [0, *(k + 1 for k in align_layers(cost[1:, 1:], last=last))] if n > 1 else [0]
    if last and n:
        return [*align_layers(cost[:-1, :-1]), m - 1]
    best = np.full((n + 1, m + 1), np.inf)
    best[0] = 0.0
    for k in range(1, n + 1):
        for column in range(k, m + 1):
            taken = best[k - 1, column - 1] + cost[k - 1, column - 1]
            best[k, column] = min(best[k, column - 1], taken)
    found: list[int] = []
    k, column = n, m
    while k:
        if best[k, column - 1] > best[k, column]:
            found.append(column - 1)
            k -= 1
        column -= 1
    return found[::-1]


def size_costs(ours: Sequence[int], theirs: Sequence[int]) -> NDArray[Any]:
    """By numbers of units: the logarithm of their ratio, and a little for standing elsewhere."""
    import numpy as np

    sizes = np.abs(np.log(np.asarray(ours, float))[:, None] - np.log(np.asarray(theirs, float)))
    places = [np.linspace(0, 1, k) if k > 1 else np.array([0.5]) for k in sizes.shape]
    found: NDArray[Any] = sizes + _PLACE * np.abs(places[0][:, None] - places[1]) ** 2
    return found


def layer_costs(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], kind: Literal["cka", "wasserstein"]
) -> NDArray[Any]:
    """How unlike each layer of one network and each of another are, by answers (samples, units)."""
    import numpy as np

    measure = _wasserstein if kind == "wasserstein" else _unlike
    return np.array([[measure(x, y) for y in theirs] for x in ours])


def _unlike(x: Tensor, y: Tensor) -> float:
    return 1.0 - debiased_cka(x, y)


def _wasserstein(x: Tensor, y: Tensor) -> float:
    """The least mean distance of units, each brought to mean 0 and deviation 1."""
    moments = Moments()
    moments.add(x, y)
    cost = (2.0 - 2.0 * moments.correlation()).clamp_min(0.0).numpy()
    return float((exact(cost).mass * cost).sum())


def debiased_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of answers (samples, units) with unbiased HSIC (Nguyen et al. 2021); 1 for equal
    answers up to rotation and scale, about 0 for unrelated ones however few samples there are.

    Works on products of samples, (samples, samples). PlanError for fewer than 4 samples.
    """
    if len(x) < 4 or len(x) != len(y):
        raise PlanError(
            "layers are compared by the answers to several samples",
            found=f"{len(x)} and {len(y)} samples",
            expected="at least 4, the same for both",
            do="give more data, or align layers by count",
        )
    grams = []
    for z in (x.double(), y.double()):
        gram = z @ z.T
        grams.append(gram - gram.diag().diag())
    first, second = grams
    both, one, other = _hsic(first, second), _hsic(first, first), _hsic(second, second)
    scale = (max(one, 0.0) * max(other, 0.0)) ** 0.5
    return both / scale if scale > 0 else 0.0


def _hsic(k: Tensor, other: Tensor) -> float:
    """Unbiased HSIC of two Gram matrices with zero diagonals (Song et al. 2012)."""
    n = len(k)
    total = (k * other).sum()
    sums = k.sum() * other.sum() / ((n - 1) * (n - 2))
    cross = (k.sum(0) * other.sum(0)).sum() * 2 / (n - 2)
    return float((total + sums - cross) / (n * (n - 3)))


def answers_of(module: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> list[Tensor]:
    """What the layers ``names`` answer to data, (samples, units) of at most 1024 samples each.

    Sequences and pictures count each place as a sample.
    """
    import torch

    layers = dict(module.named_modules())
    seen: dict[str, list[Tensor]] = {n: [] for n in names}
    share = max(1, _SAMPLES // max(1, len(batches)))

    def hook(name: str) -> Any:
        def after(layer: Any, args: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple | list) else out
            if value.ndim == 4:  # a picture's channels come first
                value = value.movedim(1, -1)
            flat = value.detach().flatten(0, -2)
            seen[name].append(flat[:: -(-len(flat) // share)])

        return layers[name].register_forward_hook(after)

    handles = [hook(n) for n in names]
    try:
        for batch in batches:
            run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(seen[n]) for n in names]
