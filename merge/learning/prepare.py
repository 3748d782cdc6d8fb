"""What differences go through before they are scaled: one part for each expert comes out.

=============  =====================================================================================
none           the differences as they are
ties:d         trimmed to the share d of largest magnitudes (of each tensor; ties:d:global: of all
               that an expert has), entries against the elected sign zeroed; not averaged
tsv:x          TSV-M's parts: leading singular directions, whitened among the experts, so that the
               sum of the parts is its merged difference; what is no matrix times x (0.15)
cart:r         the mean of the experts joins the base; a part is what the share r of leading
               singular directions makes of the deviation from it (0.16)
svd:r          each difference in the share r of its leading singular directions (1)
dare:p         a share p of the entries dropped at random, what stays divided by 1 - p
=============  =====================================================================================

A preparation works on all differences of a tensor at once, and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from merge.errors import RecipeError, nearest
from merge.learning.parts import Dense, Factored, Part
from merge.methods.core.masks import Stream
from merge.methods.core.shapes import not_a_matrix
from merge.methods.core.spectral import polar, thin_svd
from merge.methods.core.trim import kept_count

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PREPARATIONS", "Preparation", "Prepared", "preparation"]

PREPARATIONS = ("none", "ties", "tsv", "cart", "svd", "dare")
_DEFAULTS = {"ties": 0.2, "tsv": 0.15, "cart": 0.16, "svd": 1.0, "dare": 0.9}

Which = Literal["none", "ties", "tsv", "cart", "svd", "dare"]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A part for each expert, and what joins the base with them, if anything does."""

    parts: tuple[Part, ...]
    origin: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Preparation:
    """One of the preparations with its number. thresholds: of each expert, for global TIES."""

    which: Which
    value: float = 0.0
    overall: bool = False
    seed: int = 0
    thresholds: tuple[float, ...] = ()

    def __str__(self) -> str:
        if self.which == "none":
            return "none"
        return f"{self.which}:{self.value:g}" + (":global" if self.overall else "")

    @property
    def joint(self) -> bool:
        """Whether parts are made together: they depend on one another, or are kept as factors."""
        return self.which in ("ties", "tsv", "cart", "svd")

    def is_factored(self, shape: tuple[int, ...], vocabulary: bool | None = None) -> bool:
        """Whether the parts of such a tensor come in singular directions."""
        return self.which in ("tsv", "cart", "svd") and not not_a_matrix(shape, {}, vocabulary)

    def directions(
        self, shape: tuple[int, ...], count: int, vocabulary: bool | None = None
    ) -> int | None:
        """Singular directions of each part at most; None for parts that are dense."""
        if not self.is_factored(shape, vocabulary):
            return None
        if self.which == "tsv":
            return max(1, min(shape) // count)
        return max(1, math.ceil(self.value * min(shape)))

    def shares(
        self, shape: tuple[int, ...], scales: Sequence[float], vocabulary: bool | None = None
    ) -> list[float] | None:
        """What each difference is times, where parts times ``scales`` are a sum of differences.

        A sum is computed tile by tile; anything else takes all differences of a tensor at once,
        which for a vocabulary is much memory.
        """
        if self.which == "none" or (
            self.which == "svd" and not self.is_factored(shape, vocabulary)
        ):
            return list(scales)
        if self.which == "tsv" and not self.is_factored(shape, vocabulary):
            return [scale * self.value for scale in scales]
        if self.which == "cart" and not self.is_factored(shape, vocabulary):
            return [1.0 / len(scales)] * len(scales)
        return None

    def __call__(
        self, tensor: str, deltas: Sequence[Tensor], vocabulary: bool | None = None
    ) -> Prepared:
        """The parts of a tensor; the differences may be written to."""
        shape = tuple(deltas[0].shape)
        if self.which == "ties":
            return Prepared(self._dense(tensor, self._ties(deltas)))
        if self.which == "dare":
            return Prepared(tuple(self.one(i, tensor, d) for i, d in enumerate(deltas)))
        each = self.directions(shape, len(deltas), vocabulary)
        if self.which == "tsv":
            if each is None:
                return Prepared(self._dense(tensor, [d * self.value for d in deltas]))
            return Prepared(self._whitened(tensor, deltas, each))
        if self.which == "svd" and each is not None:
            return Prepared(tuple(self._thin(tensor, d, each) for d in deltas))
        if self.which == "cart":
            mean = _mean(deltas)
            if each is None:
                none = _nothing(mean)
                return Prepared(tuple(Factored(*none, tensor, self.seed) for _ in deltas), mean)
            parts = tuple(self._thin(tensor, d - mean, each) for d in deltas)
            return Prepared(parts, mean)
        return Prepared(tuple(self.one(i, tensor, d) for i, d in enumerate(deltas)))

    def _thin(self, tensor: str, delta: Tensor, rank: int) -> Part:
        return Factored(*thin_svd(delta, rank), tensor, self.seed)

    def _whitened(self, tensor: str, deltas: Sequence[Tensor], each: int) -> tuple[Part, ...]:
        """TSV-M's factors, each expert with its own columns of the whitened ones."""
        import torch

        factors = [thin_svd(d, each) for d in deltas]
        u, v = (polar(torch.cat([f[i] for f in factors], dim=-1)) for i in (0, 2))
        parts: list[Part] = []
        at = 0
        for _, s, _ in factors:
            end = at + len(s)
            own = u[:, at:end].contiguous(), s, v[:, at:end].contiguous()
            parts.append(Factored(*own, tensor, self.seed))
            at = end
        return tuple(parts)

    def _dense(self, tensor: str, values: Sequence[Tensor]) -> tuple[Part, ...]:
        return tuple(Dense(v, tensor, self.seed) for v in values)

    def _ties(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Trimmed, and without entries of the sign that was not elected."""
        import torch

        trimmed = []
        for i, delta in enumerate(deltas):
            size = delta.abs()
            if self.thresholds:
                trimmed.append(torch.where(size >= self.thresholds[i], delta, 0.0))
                continue
            kept = kept_count(self.value, delta.numel())
            trimmed.append(_largest(delta, size, kept))
        total = trimmed[0].clone()
        for other in trimmed[1:]:
            total += other
        sign = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
        return [torch.where(t * sign > 0, t, 0.0) for t in trimmed]

    def one(self, expert: int, tensor: str, delta: Tensor, start: int = 0) -> Part:
        """The part of one expert, where parts do not depend on one another.

        start: the flat index of the first element, of a run of the tensor.
        """
        if self.which == "dare":
            keep = 1.0 - self.value
            drawn = Stream(self.seed, "dare", tensor).keep(expert, start, delta.reshape(-1), keep)
            delta = (delta * drawn.view_as(delta)).div_(keep)
        return Dense(delta, tensor, self.seed, start)


def preparation(text: str, seed: int = 0) -> Preparation:
    """The preparation that a text names, such as ``ties:0.2``; RecipeError for any other."""
    which, *rest = text.split(":")
    if which not in PREPARATIONS:
        near = nearest(which, PREPARATIONS)
        raise RecipeError(
            "there is no such preparation of differences",
            key="prepare",
            found=text,
            expected=f"one of {', '.join(PREPARATIONS)}",
            do=f"did you mean {near!r}?" if near else None,
        )
    overall = which == "ties" and rest[-1:] == ["global"]
    numbers = rest[:-1] if overall else rest
    try:
        value = float(numbers[0]) if numbers else _DEFAULTS.get(which, 0.0)
    except ValueError:
        value = math.nan
    fits = 0 <= value < (math.inf if which == "tsv" else 1) or (value == 1 and which != "dare")
    if (which == "none" and numbers) or len(numbers) > 1 or not fits:
        raise RecipeError(
            "the number of a preparation is out of range",
            key="prepare",
            found=text,
            expected="such as ties:0.2, tsv, cart:0.16, svd, dare:0.9",
        )
    return Preparation(which, value, overall, seed)  # type: ignore[arg-type]


def _largest(delta: Tensor, size: Tensor, kept: int) -> Tensor:
    """The ``kept`` largest entries, ties in order of index; all others zero."""
    import torch

    if kept >= delta.numel():
        return delta
    if kept == 0:
        return torch.zeros_like(delta)
    flat = size.reshape(-1)
    threshold = flat.kthvalue(flat.numel() - kept + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().reshape(-1)
    mask[ties[: kept - int(mask.sum())]] = True
    return torch.where(mask.view_as(delta), delta, 0.0)


def _mean(deltas: Sequence[Tensor]) -> Tensor:
    total = deltas[0].clone()
    for other in deltas[1:]:
        total += other
    return total.div_(len(deltas))


def _nothing(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of no direction, for a tensor of any shape."""
    rows = like.shape[0] if like.dim() else 1
    columns = max(1, like.numel() // max(1, rows))
    return like.new_zeros(rows, 0), like.new_zeros(0), like.new_zeros(columns, 0)
