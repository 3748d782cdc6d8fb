"""Rank magnitudes within their rows by counting, and drop by rank: for the DELLA family.

A magnitude's key is its exponent and its seven leading digits, which is all that a bfloat16 has.
The keys of a row are counted, the counts summed up, and each element looks up the rank of its key:
three to four nanoseconds an element for the rows of language models, where a sort takes thirty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.methods.core.consensus import l1_ratios
from merge.methods.core.measure import Draw, Tiles
from merge.methods.core.schema import Operands, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Packed = NDArray[np.uint8]

__all__ = ["Drop", "drop_by_rank", "measure_drop", "relative_ranks"]

_DIGITS = 7  # after the leading one
_KEYS = 16 << _DIGITS  # 16 binades from a row's largest down; what is smaller still shares a key
_COUNTERS = 1 << 16  # at once, for as many rows as that suffices for: they stay in the cache


def relative_ranks(x: Tensor) -> Tensor:
    """(rank - 1) / (n - 1) for the magnitudes in each row of ``x`` (rows, n), in float32.

    0 is a row's smallest, 1 its largest. Equal keys share their mean rank, so that the mean over a
    row is 1/2, which is also the value where n is 1.
    """
    import torch

    n = x.shape[-1]
    out = torch.full(x.shape, 0.5, device=x.device)
    if n > 1:
        rows = _COUNTERS // _KEYS
        for part, ranks in zip(torch.split(x, rows), torch.split(out, rows), strict=True):
            keys = _keys(part)
            one = torch.ones((), dtype=torch.int32, device=x.device)
            counts = torch.zeros(len(part), _KEYS, dtype=torch.int32, device=x.device)
            counts.scatter_add_(1, keys, one.expand(part.shape))
            # the smaller ones, and of those with an equal key half of the others
            below = counts.cumsum(-1, dtype=torch.float64).sub_(counts, alpha=0.5).sub_(0.5)
            torch.gather(below.div_(n - 1).float(), 1, keys, out=ranks)
    return out


def _keys(x: Tensor) -> Tensor:
    """Whole numbers below `_KEYS`, in the order of the magnitudes; the largest is `_KEYS` - 1."""
    import torch

    kind, digits = (torch.int64, 52) if x.dtype == torch.float64 else (torch.int32, 23)
    keys = x.abs().view(kind) >> (digits - _DIGITS)  # of one sign, floats order like their bits
    return keys.sub_(keys.amax(-1, keepdim=True) - (_KEYS - 1)).clamp_(min=0).long()


@dataclass(frozen=True, slots=True)
class Drop:
    """What a tensor's measuring pass found: what restores each operand's L1 norm after the drop.

    masks: the drawn masks, a bit an element, by operand and start of tile, where there was room.
    """

    factors: list[float]
    masks: Mapping[tuple[int, int], Packed]


def measure_drop(
    tiles: Tiles,
    *,
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: bool = True,
    **_: object,
) -> Drop:
    """The measuring pass of DELLA. Ranks cost ten times what it costs to keep their outcome."""
    import numpy as np

    random = [i for i in range(tiles.count) if rescale and 0.0 < density[i] < 1.0]
    room = len(random) * tiles.numel // 8 <= tiles.allowance
    masks: dict[tuple[int, int], Packed] = {}

    def thin(i: int, start: int, x: Tensor) -> Tensor:
        mask = _mask(x, density[i], epsilon[i], i, start, tiles.draw)
        if room and not x.is_cuda:
            masks[i, start] = np.packbits(mask.reshape(-1).numpy().astype(np.bool_))
        return x * mask

    return Drop(l1_ratios(tiles, random, thin), masks)


def drop_by_rank(
    deltas: Operands,
    density: Sequence[float],
    epsilon: Sequence[float],
    *,
    measured: Drop,
    start: int,
    draw: Draw,
) -> list[Tensor]:
    """Each delta, as rows, with elements kept at random, the larger in their row the likelier."""
    out = []
    for i, (d, p, e) in enumerate(zip(deltas, density, epsilon, strict=True)):
        if (packed := measured.masks.get((i, start))) is not None:
            out.append(d * _unpacked(packed, d))
        else:
            out.append(d if p >= 1.0 else d * _mask(d, p, e, i, start, draw))
    return out


def _unpacked(packed: Packed, like: Tensor) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.unpackbits(packed, count=like.numel())).view_as(like)


def _mask(
    x: Tensor, density: float, epsilon: float, operand: int, start: int, draw: Draw
) -> Tensor:
    import torch

    if density <= 0.0:
        return torch.zeros_like(x)
    probability = relative_ranks(x).mul_(2.0 * epsilon).add_(density - epsilon).clamp_(0.0, 1.0)
    return draw.keep_each(operand, start, probability)
