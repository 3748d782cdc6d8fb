"""Random bits by counter: the bits of an element depend on its key and index, on nothing else.

word(j) = lowbias32(j * a + b), with a (odd) and b taken from a SHA-256 of the key; lowbias32 is
the multiply and xor-shift finaliser of C. Wellons' hash-prospector (2018). A word serves two
neighbours with 16 bits each, which halves the cost to about half a nanosecond an element; where 16
bits are too coarse for a probability, each element has a word of its own. Integers only, so the
same bits come out for any tile, thread, rank, order of work and device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from merge.methods.core.schema import Tensor

__all__ = ["Stream"]

_M1, _M2 = 0x7FEB352D, 0x846CA68B  # lowbias32
_RARE = 1 / 64  # 16 bits serve probabilities from here to 1 minus this: off by 0.05 % at most


@dataclass(frozen=True, slots=True)
class Stream:
    """The random bits of one tensor, keyed by (seed, method, operand, tensor name)."""

    seed: int
    method: str
    tensor: str

    def keep(self, operand: int, start: int, like: Tensor, probability: float) -> Tensor:
        """A mask shaped as ``like``: 1.0 with ``probability`` and else 0.0.

        ``start`` is the flat index of the first element. The probability is rounded to a multiple
        of 2^-16, or of 2^-32 below 1/64 and above 63/64.
        """
        import torch

        lanes = 2 if _RARE <= probability <= 1 - _RARE else 1
        bits = 32 // lanes
        limit = round(probability * 2**bits)
        if limit >= 1 << bits:
            return torch.ones_like(like)
        mask = torch.empty_like(like)
        torch.lt(self._drawn(operand, lanes, start, like), limit - 2 ** (bits - 1), out=mask)
        return mask

    def keep_each(self, operand: int, start: int, probability: Tensor) -> Tensor:
        """A mask shaped as ``probability``: each element 1.0 with its own, and else 0.0.

        The probabilities are rounded to multiples of 2^-16.
        """
        import torch

        limit = (probability * 2**16).round_().sub_(2**15)
        return torch.lt(self._drawn(operand, 2, start, limit), limit, out=limit)

    def pick(self, operand: int, start: int, like: Tensor, count: int) -> Tensor:
        """Whole numbers from 0 to ``count`` - 1 for the elements of ``like``, as int64.

        ``start`` is the flat index of the first element. Equally likely to one part in 2^32.
        """
        words = self._drawn(operand, 1, start, like).long() + 2**31
        return (words * count) >> 32

    def _drawn(self, operand: int, lanes: int, start: int, like: Tensor) -> Tensor:
        """Signed integers of 32 / ``lanes`` bits, all equally likely, shaped as ``like``."""
        import torch

        first, skip = divmod(start, lanes)
        words = self._words(operand, lanes, first, -(-(skip + like.numel()) // lanes), like.device)
        drawn = words.view(torch.int16)[skip : skip + like.numel()] if lanes == 2 else words
        return drawn.view_as(like)

    def _words(self, operand: int, lanes: int, first: int, count: int, device: Any) -> Tensor:
        """``count`` random 32-bit words from number ``first`` on."""
        import torch

        epoch, at = divmod(first, 1 << 32)
        if (fits := (1 << 32) - at) < count:  # the counter starts anew, under another key
            parts = ((first, fits), (first + fits, count - fits))
            return torch.cat([self._words(operand, lanes, *part, device) for part in parts])
        step, offset = self._key(operand, lanes, epoch)
        words = torch.mul(_counter(count, device), _signed(step))
        words.add_(_signed(at * step + offset))
        _xorshift(words, 16).mul_(_signed(_M1))
        _xorshift(words, 15).mul_(_signed(_M2))
        return _xorshift(words, 16)

    def _key(self, operand: int, lanes: int, epoch: int) -> tuple[int, int]:
        text = f"{self.seed}/{self.method}/{operand}/{lanes}/{epoch}/{self.tensor}"
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:4], "little") | 1, int.from_bytes(digest[4:8], "little")


def _counter(count: int, device: Any) -> Tensor:
    """0, 1, 2, ..., never written to."""
    import torch

    if device.type == "cpu":
        return _counted(count)
    return torch.arange(count, dtype=torch.int32, device=device)  # each worker has its own stream


@lru_cache(maxsize=4)
def _counted(count: int) -> Tensor:
    import torch

    return torch.arange(count, dtype=torch.int32)


def _signed(value: int) -> int:
    """The low 32 bits of ``value`` as a signed integer, which is what torch's int32 holds."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _xorshift(words: Tensor, bits: int) -> Tensor:
    """words ^= words >> bits, with zeros shifted in (torch shifts the sign in, so mask it off)."""
    shifted = words >> bits
    return words.bitwise_xor_(shifted.bitwise_and_((1 << (32 - bits)) - 1))
