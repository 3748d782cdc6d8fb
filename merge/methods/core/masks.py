"""Random bits by counter: the bits of an element depend on its key and index, on nothing else.

word(i) = lowbias32(((i + a) * M2) xor b), where a and b are 32 bits each of a SHA-256 of the key
and lowbias32 is the multiply and xor-shift finaliser of C. Wellons' hash-prospector (2018). All in
32-bit integers, about half a nanosecond an element. The same bits come out for any tile, thread,
rank, order of work and device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from merge.methods.core.schema import Tensor

__all__ = ["Stream"]

_M1, _M2 = 0x7FEB352D, 0x846CA68B  # lowbias32


@dataclass(frozen=True, slots=True)
class Stream:
    """The random bits of one tensor, keyed by (seed, method, operand, tensor name)."""

    seed: int
    method: str
    tensor: str

    def keep(self, operand: int, start: int, like: Tensor, probability: float) -> Tensor:
        """A mask shaped as ``like``: 1.0 with ``probability`` and else 0.0.

        ``start`` is the flat index of the first element. Resolution 2^-32.
        """
        import torch

        n = like.numel()
        high, low = divmod(start, 1 << 32)
        if low + n > 1 << 32:
            raise ValueError("a tile may not straddle a multiple of 2^32 elements")
        a, b = self._key(operand, high)
        words = torch.arange(n, dtype=torch.int32, device=like.device)
        words.add_(_signed(low + a)).mul_(_signed(_M2)).bitwise_xor_(_signed(b))
        _xorshift(words, 16).mul_(_signed(_M1))
        _xorshift(words, 15).mul_(_signed(_M2))
        _xorshift(words, 16)
        limit = round(probability * 2**32)
        if limit >= 1 << 32:
            return torch.ones_like(like)
        mask = torch.empty_like(like)
        # words are uniform over the signed 32-bit integers: below the limit, counted from the least
        torch.lt(words.view_as(like), limit - 2**31, out=mask)
        return mask

    def _key(self, operand: int, high: int) -> tuple[int, int]:
        text = f"{self.seed}/{self.method}/{operand}/{high}/{self.tensor}"
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _signed(value: int) -> int:
    """The low 32 bits of ``value`` as a signed integer, which is what torch's int32 holds."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _xorshift(words: Tensor, bits: int) -> Tensor:
    """words ^= words >> bits, with zeros shifted in (torch shifts the sign in, so mask it off)."""
    shifted = words >> bits
    return words.bitwise_xor_(shifted.bitwise_and_((1 << (32 - bits)) - 1))
