"""Weights that are stored as codes and scales, as the numbers they stand for.

Each tensor of codes becomes one of its model's float type, computed as it is read; its scales are
part of it, and what scales activations is dropped. Nothing is held but a tile, or one expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from merge.checkpoint.mxfp4 import BLOCKS, GROUP, MXFP4, POWERS, experts
from merge.checkpoint.scheme import ENTRIES, Scheme, plain_dtype, scheme_of
from merge.errors import SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import BlockScaled, Whole, window
from merge.ir.dtypes import F32, DType
from merge.ir.expr import Expr, reads, walk

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dequantised", "stored_as"]

_SCALES = {
    "_scale_inv": "",
    "_scale": "",
    ".scale": ".weight",
    ".qscale_weight": ".weight",
    ".scale_weight": ".weight",
}
"""Ends of the names of scales, and what stands there in the name of their codes."""

_OF_WEIGHTS = re.compile(r"(weight_scale|_scale_inv|\.qscale_weight|\.scale_weight)$")
_OF_ACTIVATIONS = re.compile(
    r"(^|[._])((input|activation|output|[qkv]|kv|prob)_scale(_ub)?|qscale_act|scale_input)$"
)
_UNUSED = "it scales activations of a quantised model, and the result is not quantised"


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the weights that codes and scales stand for, and a config that says so.

    Weights bear the names that the model itself has for them. As it is where there are no codes.
    Raises SourceError that names the tensor whose codes or scales are missing or do not fit.
    """
    tensors, config = checkpoint.tensors, checkpoint.side.config
    scheme, dtype = scheme_of(config), plain_dtype(config)
    scales = {codes: name for name in tensors if (codes := _codes_of(name, tensors)) is not None}
    packed = {n.removesuffix(BLOCKS): n for n in tensors if _is_packed(n, tensors, scheme)}
    if scheme is None and not scales and not packed:
        return checkpoint
    known = scheme or Scheme("codes with scales")
    unused = [n for n in tensors if scheme and _OF_ACTIVATIONS.search(n)]
    taken = {*scales.values(), *unused, *(n + POWERS for n in packed)}
    out: dict[str, Expr] = {}
    folders = dict(checkpoint.folders)
    for name, expr in tensors.items():
        stem = name.removesuffix(BLOCKS)
        if name in scales:
            out[name] = _scaled(expr, tensors[scales[name]], known, scales[name], dtype)
        elif packed.get(stem) == name:
            out[stem] = _unpacked(stem, tensors, dtype)
            folders.update({stem: folders[name]} if name in folders else {})
        elif name not in taken:
            if scheme is not None:
                _check_complete(name, expr)
            out[name] = expr
    note = (
        f"{checkpoint.label} is quantised ({known.method}): {len(scales) + len(packed)} tensors are"
        f" read as the {dtype.name} that their codes and scales stand for"
    )
    return replace(
        checkpoint,
        tensors=out,
        side=checkpoint.side.with_config(_plain(config, dtype)) if scheme else checkpoint.side,
        dropped={**checkpoint.dropped, **dict.fromkeys(unused, _UNUSED)},
        folders=folders,
        notes=(*checkpoint.notes, note),
    )


def stored_as(expr: Expr) -> str | None:
    """How the codes are stored that ``expr`` is computed from; None where there are none."""
    for node in walk(expr):
        if isinstance(node, BlockScaled):
            high, wide = node.block
            return f"{node.operands[0].dtype.name} in blocks of {high}x{wide}"
        if isinstance(node, Whole) and node.name == MXFP4:
            return f"{MXFP4} in blocks of {GROUP}"
    return None


def _codes_of(name: str, tensors: Mapping[str, Expr]) -> str | None:
    """The codes that ``name`` holds the scales of; None where it holds none."""
    for end, instead in _SCALES.items():
        codes = name.removesuffix(end) + instead
        if name.endswith(end) and codes in tensors and _is_code(tensors[codes]):
            return codes
    return None


def _is_code(expr: Expr) -> bool:
    return expr.dtype.kind == "float" and expr.dtype.bits == 8


def _is_packed(name: str, tensors: Mapping[str, Expr], scheme: Scheme | None) -> bool:
    """Whether these are blocks of MXFP4: all of such names, where config.json says so."""
    if not name.endswith(BLOCKS) or tensors[name].dtype.name != "uint8":
        return False
    if scheme is not None:
        return scheme.method == MXFP4
    scales, shape = tensors.get(name.removesuffix(BLOCKS) + POWERS), tensors[name].shape
    return scales is not None and len(shape) == 4 and scales.shape == shape[:-1]


def _check_complete(name: str, expr: Expr) -> None:
    """Raise SourceError for codes without scales, and scales without codes."""
    if _is_code(expr):
        raise _wrong("codes have no scales", name, expr, f"{name}_scale_inv or {name}_scale")
    powers = name.endswith(POWERS) and expr.dtype.name == "uint8"
    if powers or _OF_WEIGHTS.search(name):
        codes = re.sub(f"_scale(_inv)?$|{POWERS}$", BLOCKS if powers else "", name)
        raise _wrong("scales have no codes", name, expr, f"{codes}, in a type of codes")


def _scaled(codes: Expr, scales: Expr, scheme: Scheme, name: str, dtype: DType) -> Expr:
    """Codes times scales, which are one for all, or one for each block, row or column.

    name: of the scales.
    """
    shape = codes.shape
    rows, columns = (1, *shape)[-2:]
    if scales.dtype.name == "uint8":  # a power of two, biased by 127
        scales = Whole("power of two", _powers, (scales,), (), scales.shape, F32)
    elif scales.dtype.kind != "float" and scales.dtype.name != "float8_e8m0fnu":
        raise _wrong("scales are of a type that scales are not", name, scales, "a float type")
    if math.prod(scales.shape) == 1:
        flat = (math.prod(shape) // max(1, columns), columns)
        one = window(scales, 0, (1, 1))
        return window(BlockScaled((window(codes, 0, flat), one), flat, flat, dtype), 0, shape)
    if scales.shape == (rows,) and len(shape) == 2:
        scales = window(scales, 0, (rows, 1))
    grids = {
        (*shape[:-2], -(-rows // high), -(-columns // wide)): (high, wide)
        for high, wide in ((rows, columns), (rows, 1), (1, columns), *reversed(scheme.blocks))
    }
    if scales.shape not in grids or len(shape) < 2:
        fitting = ", ".join(str(list(grid)) for grid in reversed(grids))
        raise _wrong("scales do not fit their codes", name, scales, f"{fitting}, or one number")
    return BlockScaled((codes, scales), grids[scales.shape], shape, dtype)


def _powers(codes: Tensor) -> Tensor:
    """2 to the power of (byte - 127), in float32."""
    import torch

    return codes.view(torch.float8_e8m0fnu).float()


def _unpacked(stem: str, tensors: Mapping[str, Expr], dtype: DType) -> Expr:
    """A stack of experts of MXFP4; ``stem`` is what the model calls it."""
    blocks, scales = tensors[stem + BLOCKS], tensors.get(stem + POWERS)
    if scales is None:
        raise _wrong("codes have no scales", stem + BLOCKS, blocks, stem + POWERS)
    if stem in tensors:
        raise _wrong("a weight is there twice", stem, tensors[stem], f"only {stem + BLOCKS}")
    if len(blocks.shape) != 4 or blocks.shape[-1] != GROUP // 2 or 0 in blocks.shape:
        expected = f"[experts, outputs, inputs / {GROUP}, {GROUP // 2}]"
        raise _wrong("codes are not in groups of 32", stem + BLOCKS, blocks, expected)
    if scales.shape != blocks.shape[:-1] or scales.dtype.name != "uint8":
        expected = f"uint8 {list(blocks.shape[:-1])}"
        raise _wrong("scales do not fit their codes", stem + POWERS, scales, expected)
    return experts(blocks, scales, dtype)


def _wrong(what: str, name: str, expr: Expr, expected: str) -> SourceError:
    read = next(iter(reads(expr)))
    return SourceError(
        f"the model is quantised, and {what}",
        file=read.source.location(read.spec.name).file,
        tensor=name,
        found=f"{read.dtype.name} {list(read.shape)}",
        expected=expected,
        do="fetch the model again, or use the one that it was quantised from",
    )


def _plain(config: Mapping[str, object], dtype: DType) -> dict[str, object]:
    """``config`` of the same model in plain numbers of type ``dtype``."""
    out = {
        key: _without(value) if isinstance(value, Mapping) else value
        for key, value in _without(config).items()
    }
    out["dtype" if "dtype" in config else "torch_dtype"] = dtype.name
    return out


def _without(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in ENTRIES}
