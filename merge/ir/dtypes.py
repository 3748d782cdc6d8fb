"""Element types: safetensors code, torch name, size and kind, as data (no torch needed)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal

from merge.errors import RecipeError, hint

__all__ = ["BF16", "BY_CODE", "BY_NAME", "F16", "F32", "F64", "DType", "parse_dtype", "promote"]

Kind = Literal["float", "int", "bool", "complex", "packed"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type. ``bits`` per element; ``name`` is torch's attribute name."""

    code: str
    name: str
    bits: int
    kind: Kind

    def __str__(self) -> str:
        return self.name

    @property
    def itemsize(self) -> int:
        """Bytes per element; packed types (two or more to a byte) have none."""
        if self.bits % 8:
            raise ValueError(f"{self.name} has no whole number of bytes per element")
        return self.bits // 8


F64 = DType("F64", "float64", 64, "float")
F32 = DType("F32", "float32", 32, "float")
F16 = DType("F16", "float16", 16, "float")
BF16 = DType("BF16", "bfloat16", 16, "float")

_ALL = (
    F64,
    F32,
    F16,
    BF16,
    DType("F8_E4M3", "float8_e4m3fn", 8, "float"),
    DType("F8_E5M2", "float8_e5m2", 8, "float"),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8, "float"),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8, "float"),
    DType("F8_E8M0", "float8_e8m0fnu", 8, "packed"),  # a scale, never a weight
    DType("F6_E2M3", "float6_e2m3", 6, "packed"),
    DType("F6_E3M2", "float6_e3m2", 6, "packed"),
    DType("F4", "float4_e2m1fn_x2", 4, "packed"),
    DType("C64", "complex64", 64, "complex"),
    DType("I64", "int64", 64, "int"),
    DType("I32", "int32", 32, "int"),
    DType("I16", "int16", 16, "int"),
    DType("I8", "int8", 8, "int"),
    DType("U64", "uint64", 64, "int"),
    DType("U32", "uint32", 32, "int"),
    DType("U16", "uint16", 16, "int"),
    DType("U8", "uint8", 8, "int"),
    DType("BOOL", "bool", 8, "bool"),
)
BY_CODE = {d.code: d for d in _ALL}
BY_NAME = {d.name: d for d in _ALL}
_SHORT = {"bf16": BF16, "fp16": F16, "half": F16, "fp32": F32, "float": F32, "fp64": F64}
_RANK = {d.name: i for i, d in enumerate((BF16, F16, F32, F64))}


def parse_dtype(text: str) -> DType:
    """The float type that a recipe or a flag names: ``bfloat16``, ``bf16``, ``torch.bfloat16``, ...

    >>> parse_dtype("torch.bfloat16").code
    'BF16'
    """
    word = text.removeprefix("torch.").lower()
    found = _SHORT.get(word) or BY_NAME.get(word)
    if found is None or found.kind != "float":
        names = [d.name for d in _ALL if d.kind == "float"] + list(_SHORT)
        raise RecipeError(
            f"unknown dtype {text!r}",
            expected="one of float32, float16, bfloat16, float64",
            do=hint(word, names),
        )
    return found


def promote(*types: DType) -> DType:
    """The smallest listed type that holds them all: equal stays, bf16 with f16 is f32.

    Eight-bit floats give way to any other float. Non-float types must all be equal.

    >>> promote(BF16, F32).name, promote(BF16, F16).name
    ('float32', 'float32')
    """
    return reduce(_promote, types)


def _promote(a: DType, b: DType) -> DType:
    if a == b:
        return a
    if a.kind != "float" or b.kind != "float":
        raise ValueError(f"{a.name} and {b.name} do not promote")
    if a.bits == b.bits:  # bf16 with f16, or two kinds of eight-bit float
        return F32 if a.bits == 16 else BF16
    return max(a, b, key=lambda d: (d.bits, _RANK.get(d.name, -1)))
